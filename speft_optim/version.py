"""The version, in one place: it is known too where the package runs from a source tree that was never installed."""

__version__ = "0.1.0"
