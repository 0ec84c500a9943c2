"""The optimizer over compact values."""
