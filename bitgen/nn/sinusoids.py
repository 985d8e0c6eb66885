"""Sinusoidal embedding of a number, such as a time (Vaswani et al. 2017)."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def sinusoids(t: Float[Array, "*b"] | Int[Array, "*b"], size: int) -> Float[Array, "*b size"]:
    """Returns the cosines and sines of t at size / 2 frequencies from 1 down to 1 / 10,000."""
    exponents = -math.log(10_000) * np.arange(size // 2, dtype=np.float32) / (size // 2)
    # Rounded once, as PyTorch rounds: a last digit here is an angle of 1e-4 at t = 1000.
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    frequencies = frequencies.reshape((1,) * t.ndim + (-1,))
    angles = t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
