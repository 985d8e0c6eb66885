"""The version of bitgen, which the package and every model directory have."""

__version__ = "0.1.0"
