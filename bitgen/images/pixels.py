"""Images between uint8 (files and screen) and float32 in [-1, 1] (everywhere else)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8


def from_uint8(images: UInt8[Array, "*b H W c"]) -> Float[Array, "*b H W c"]:
    """Returns uint8 0..255 as float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 127.5 - 1


def to_uint8(images: Float[Array, "*b H W c"]) -> UInt8[Array, "*b H W c"]:
    """Returns float [-1, 1] as uint8, rounded half up and clipped, as ADM and BitDance do."""
    return jnp.floor(jnp.clip(images.astype(jnp.float32) * 127.5 + 128, 0, 255)).astype(jnp.uint8)
