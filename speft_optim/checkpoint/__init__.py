"""Files of trained entries and of merged models."""
