"""The version, in a file that imports nothing: what notes it need not import the package's face."""

__version__ = "0.1.0"
