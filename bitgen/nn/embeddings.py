"""Sinusoidal embeddings of times and rotary embeddings of positions."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def sinusoids(t: Float[Array, "*b"] | Int[Array, "*b"], size: int) -> Float[Array, "*b size"]:
    """Returns the cosines and sines of t at size / 2 frequencies from 1 down to 1 / 10,000.

    Follows Vaswani et al. 2017.
    """
    exponents = -math.log(10_000) * np.arange(size // 2, dtype=np.float32) / (size // 2)
    # Rounded once, as PyTorch rounds: a last digit here is an angle of 1e-4 at t = 1000.
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    frequencies = frequencies.reshape((1,) * t.ndim + (-1,))
    angles = t.astype(jnp.float32)[..., None] * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def grid_rotations(
    height: int,
    width: int,
    head_dim: int,
    base: float = 10_000.0,
    *,
    offset: float = 0.0,
    columns_first: bool = False,
) -> Float[np.ndarray, "n head_dim/2 2"]:
    """Returns (cos, sin) of the rotary angles of each cell of a grid (Su et al. 2021; LlamaGen).

    Half of the channel pairs turn with the row, half with the column; both start at `offset`.
    """
    half = head_dim // 2
    frequencies = 1.0 / base ** (np.arange(0, half, 2, dtype=np.float32)[: half // 2] / half)
    rows = (np.arange(height, dtype=np.float32) + offset)[:, None, None] * frequencies
    columns = (np.arange(width, dtype=np.float32) + offset)[None, :, None] * frequencies
    shape = (height, width, len(frequencies))
    halves = [np.broadcast_to(axis, shape) for axis in (rows, columns)]
    angles = np.concatenate(halves[::-1] if columns_first else halves, -1)
    return np.stack([np.cos(angles), np.sin(angles)], -1).reshape(height * width, -1, 2)


def rotate(
    x: Float[Array, "b n heads head_dim"], rotations: Float[Array, "n head_dim/2 2"]
) -> Float[Array, "b n heads head_dim"]:
    """Returns x with each pair of neighbouring channels rotated by its token's angle."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    cos, sin = rotations[None, :, None, :, 0], rotations[None, :, None, :, 1]
    first, second = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
