"""bitgen: binary and bitwise image generation in JAX."""

__version__ = "0.1.0"
