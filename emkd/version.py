"""The version of emkd, for the package, the command line and what it writes."""

__version__ = "0.1.0"
