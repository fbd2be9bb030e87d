"""The version of nnssl."""

__version__ = "0.1.0"
