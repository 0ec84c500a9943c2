"""Adapters on a base: load, switch, mix, unload, merge."""
