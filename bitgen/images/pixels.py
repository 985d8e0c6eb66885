"""Images between uint8, in files and on screen, and float32 in [-1, 1], everywhere else."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def from_uint8(images: UInt8[Array, "*b H W c"]) -> Float[Array, "*b H W c"]:
    """Returns 0..255 as float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: Float[Array, "*b H W c"]) -> UInt8[Array, "*b H W c"]:
    """Returns [-1, 1] as 0..255, rounded half up and clipped: ADM's and BitDance's rule."""
    return jnp.floor(jnp.clip(images.astype(jnp.float32) * 127.5 + 128, 0, 255)).astype(jnp.uint8)
