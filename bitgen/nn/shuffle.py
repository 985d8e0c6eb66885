"""Pixel shuffles, NHWC in PyTorch's order of channels, and DC-AE's shortcuts (arXiv 2410.10733)."""

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float


def pixel_unshuffle(x: Float[Array, "b H W c"], factor: int) -> Float[Array, "b h w cff"]:
    """Returns blocks of factor x factor pixels as channels, H = h · factor."""
    return rearrange(x, "b (h i) (w j) c -> b h w (c i j)", i=factor, j=factor)


def pixel_shuffle(x: Float[Array, "b h w cff"], factor: int) -> Float[Array, "b H W c"]:
    """Returns channels as blocks of factor x factor pixels: undoes `pixel_unshuffle`."""
    return rearrange(x, "b h w (c i j) -> b (h i) (w j) c", i=factor, j=factor)


def average_channels(
    x: Float[Array, "b H W c"], features: int, factor: int = 1
) -> Float[Array, "b h w features"]:
    """Returns x downsampled by `factor`: the means of neighbouring channels after unshuffling."""
    x = pixel_unshuffle(x, factor)
    return rearrange(x, "b h w (c g) -> b h w c g", c=features).mean(-1)


def repeat_channels(
    x: Float[Array, "b h w c"], features: int, factor: int = 1
) -> Float[Array, "b H W features"]:
    """Returns x upsampled by `factor`: each channel is repeated before shuffling."""
    return pixel_shuffle(jnp.repeat(x, features * factor**2 // x.shape[-1], axis=-1), factor)


def repeat_pixels(x: Float[Array, "b h w c"]) -> Float[Array, "b 2h 2w c"]:
    """Returns x at twice the resolution by nearest-neighbour interpolation."""
    return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
