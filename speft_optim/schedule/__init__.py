"""Dynamic masks: entries are chosen again during training."""
