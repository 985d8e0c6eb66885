"""DiffAugment: differentiable augmentation of what a discriminator sees (arXiv 2006.10738).

The functions work in the range the images come in. Saturation and contrast mean the same in every
range, but a brightness offset of 0.5 is half of [0, 1] and a quarter of [-1, 1], and the border
that a shift leaves is zero: black in [0, 1], grey in [-1, 1]. Binary Latent Diffusion augments
images in [0, 1], the paper's code images in [-1, 1].
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
    """The random numbers of one augmentation, one entry an image."""

    brightness: Float[Array, " b"]  # added, in [-0.5, 0.5)
    saturation: Float[Array, " b"]  # times the distance to the pixel's grey, in [0, 2)
    contrast: Float[Array, " b"]  # times the distance to the image's mean, in [0.5, 1.5)
    shift: Int[Array, "b 2"]  # rows, columns, each in ±shift_limits


def shift_limits(height: int, width: int) -> tuple[int, int]:
    """The largest shift in rows and columns: an eighth of the side, rounded half up."""
    return int(height * SHIFT_RATIO + 0.5), int(width * SHIFT_RATIO + 0.5)


def draw_factors(key: Key[Array, ""], batch: int, height: int, width: int) -> AugmentFactors:
    """Draws the factors of `batch` images of the given size, each image its own."""
    brightness, saturation, contrast, rows, columns = jax.random.split(key, 5)
    row_limit, column_limit = shift_limits(height, width)
    return AugmentFactors(
        jax.random.uniform(brightness, (batch,), minval=-0.5, maxval=0.5),
        jax.random.uniform(saturation, (batch,), minval=0.0, maxval=2.0),
        jax.random.uniform(contrast, (batch,), minval=0.5, maxval=1.5),
        jnp.stack(
            [
                jax.random.randint(rows, (batch,), -row_limit, row_limit + 1),
                jax.random.randint(columns, (batch,), -column_limit, column_limit + 1),
            ],
            axis=-1,
        ),
    )


def adjust_brightness(
    images: Float[Array, "b H W c"], offset: Float[Array, " b"]
) -> Float[Array, "b H W c"]:
    """Adds one offset to all pixels of an image."""
    return images + _per_image(offset, images)


def adjust_saturation(
    images: Float[Array, "b H W c"], factor: Float[Array, " b"]
) -> Float[Array, "b H W c"]:
    """Scales each pixel's distance to its mean over channels: 0 is grey, 1 leaves it as it is."""
    grey = jnp.mean(images, axis=-1, keepdims=True)
    return (images - grey) * _per_image(factor, images) + grey


def adjust_contrast(
    images: Float[Array, "b H W c"], factor: Float[Array, " b"]
) -> Float[Array, "b H W c"]:
    """Scales each value's distance to its image's mean over pixels and channels."""
    mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    return (images - mean) * _per_image(factor, images) + mean


def translate(images: Float[Array, "b H W c"], shift: Int[Array, "b 2"]) -> Float[Array, "b H W c"]:
    """Moves each image's content up by shift[0] rows and left by shift[1] columns; zeros come in.

    Shifts lie within `shift_limits` of the image size; a larger one acts as the limit.
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
    """Augments each image by its own random factors, in the range it comes in; not clipped.

    `policy` names what is done, in order: "color" (brightness, then saturation, then contrast) and
    "translation". UserError on any other name. Follows the paper's code, arXiv 2006.10738.
    """
    unknown = [name for name in policy if name not in POLICIES]
    if isinstance(policy, str) or unknown:
        raise UserError(
            f"unknown DiffAugment policy {policy!r}: give a list out of {list(POLICIES)}"
        )
    batch, height, width, _ = images.shape
    factors = draw_factors(key, batch, height, width)
    for name in policy:
        if name == "color":
            images = adjust_brightness(images, factors.brightness)
            images = adjust_saturation(images, factors.saturation)
            images = adjust_contrast(images, factors.contrast)
        else:
            images = translate(images, factors.shift)
    return images


def _per_image(factor: Float[Array, " b"], images: Array) -> Float[Array, "b 1 1 1"]:
    return factor.astype(images.dtype).reshape(-1, 1, 1, 1)
