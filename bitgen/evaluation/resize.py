"""Bilinear resizing as in the two families of FID code, by two small matrices.

Neither filters before downsampling; that is part of the published numbers.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def bilinear_weights(source: int, target: int, *, legacy: bool) -> Float[np.ndarray, "t s"]:
    """Returns the matrix that resizes a line of `source` values to `target` values.

    legacy: TensorFlow 1's `resize_bilinear`, where output i is at i * source / target; otherwise
    PyTorch's, where pixel centres are at one half. Positions are float32, as in the originals.
    """
    scale = np.float32(source) / np.float32(target)
    position = np.arange(target, dtype=np.float32)
    if legacy:
        position = position * scale
    else:
        position = np.maximum((position + np.float32(0.5)) * scale - np.float32(0.5), 0)
    low = np.minimum(np.floor(position).astype(int), source - 1)
    share = (position - low).astype(np.float32)
    weights = np.zeros((target, source), np.float32)
    rows = np.arange(target)
    weights[rows, low] += 1 - share
    weights[rows, np.minimum(low + 1, source - 1)] += share  # the last pixel stands for the next
    return weights


def resize_bilinear(
    images: Float[Array, "b H W c"], size: int, *, legacy: bool
) -> Float[Array, "b size size c"]:
    """Returns images resized to size x size; `legacy` as in `bilinear_weights`."""
    height, width = images.shape[1:3]
    if (height, width) == (size, size):
        return images
    rows = jnp.asarray(bilinear_weights(height, size, legacy=legacy))
    columns = jnp.asarray(bilinear_weights(width, size, legacy=legacy))
    highest = jax.lax.Precision.HIGHEST
    images = jnp.einsum("qw,bhwc->bhqc", columns, images, precision=highest)
    return jnp.einsum("ph,bhqc->bpqc", rows, images, precision=highest)
