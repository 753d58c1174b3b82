"""The version, apart from everything else so that the build can read it without torch."""

__version__ = "0.1.0"
