"""Runnable training jobs built on `speft_optim`; start one with ``python -m recipes.gsm8k --help``."""
