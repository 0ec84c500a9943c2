"""Scoring of checkpoints and adapters with lm-eval, and comparison of the scores."""
