"""The version, apart from everything else so that the build can read it without torch. Floor 0."""

__version__ = "0.1.0"
