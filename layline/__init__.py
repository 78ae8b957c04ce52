"""The face of the project: the command line and the public Python API."""

__version__ = "0.5.0"
