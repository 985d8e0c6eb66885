"""DiffAugment: differentiable augmentation of a discriminator's input (arXiv 2006.10738).

Images keep their range, which matters: a brightness offset of 0.5 is half of [0, 1] and a quarter
of [-1, 1], and shifts bring in zeros, black in [0, 1] and grey in [-1, 1]. Binary Latent Diffusion
augments images in [0, 1], the paper's code in [-1, 1].
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from bitgen.errors import UserError

SHIFT_RATIO = 0.125
POLICIES = ("color", "translation")


class AugmentFactors(NamedTuple):
    """The random factors of an augmentation, one entry an image."""

    brightness: Float[Array, " b"]  # added, in [-0.5, 0.5)
    saturation: Float[Array, " b"]  # times the distance to the pixel's grey, in [0, 2)
    contrast: Float[Array, " b"]  # times the distance to the image's mean, in [0.5, 1.5)
    shift: Int[Array, "b 2"]  # rows, columns, each in ±shift_limits


def shift_limits(height: int, width: int) -> tuple[int, int]:
    """Returns the largest shift in rows and columns: an eighth of the side, rounded half up."""
    return int(height * SHIFT_RATIO + 0.5), int(width * SHIFT_RATIO + 0.5)


def draw_factors(key: Key[Array, ""], batch: int, height: int, width: int) -> AugmentFactors:
    """Returns random factors for `batch` images of the given size."""
    brightness, saturation, contrast, *shifts = jax.random.split(key, 5)

    def uniform(key, low, high):
        return jax.random.uniform(key, (batch,), minval=low, maxval=high)

    shift = [
        jax.random.randint(key, (batch,), -limit, limit + 1)
        for key, limit in zip(shifts, shift_limits(height, width), strict=True)
    ]
    return AugmentFactors(
        uniform(brightness, -0.5, 0.5),
        uniform(saturation, 0.0, 2.0),
        uniform(contrast, 0.5, 1.5),
        jnp.stack(shift, axis=-1),
    )


def adjust_color(
    images: Float[Array, "b H W c"], factors: AugmentFactors
) -> Float[Array, "b H W c"]:
    """Returns images with changed brightness, then saturation, then contrast."""
    brightness, saturation, contrast = (
        factor.astype(images.dtype).reshape(-1, 1, 1, 1) for factor in factors[:3]
    )
    images = images + brightness
    grey = jnp.mean(images, axis=-1, keepdims=True)
    images = (images - grey) * saturation + grey
    mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    return (images - mean) * contrast + mean


def translate(images: Float[Array, "b H W c"], shift: Int[Array, "b 2"]) -> Float[Array, "b H W c"]:
    """Returns images moved up by shift[0] rows and left by shift[1] columns, padded with zeros.

    Shifts are clipped to `shift_limits`.
    """
    row_limit, column_limit = shift_limits(*images.shape[1:3])
    margins = ((0, 0), (row_limit, row_limit), (column_limit, column_limit), (0, 0))
    padded = jnp.pad(images, margins)
    start = shift + jnp.array([[row_limit, column_limit]], shift.dtype)

    def crop(image, start):
        return jax.lax.dynamic_slice(image, (start[0], start[1], 0), images.shape[1:])

    return jax.vmap(crop)(padded, start)


def diff_augment(
    images: Float[Array, "b H W c"],
    key: Key[Array, ""],
    policy: Sequence[str] = POLICIES,
) -> Float[Array, "b H W c"]:
    """Returns images augmented by random factors, in their own range and not clipped.

    `policy` lists the augmentations in order, "color" and "translation". Raises UserError for other
    names. Follows the paper's code, arXiv 2006.10738.
    """
    unknown = [name for name in policy if name not in POLICIES]
    if isinstance(policy, str) or unknown:
        raise UserError(
            f"unknown DiffAugment policy {policy!r}: give a list out of {list(POLICIES)}"
        )
    batch, height, width, _ = images.shape
    factors = draw_factors(key, batch, height, width)
    for name in policy:
        color = name == "color"
        images = adjust_color(images, factors) if color else translate(images, factors.shift)
    return images
