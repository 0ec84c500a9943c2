"""Adapter files with the trained entries, and checkpoints of merged models."""
