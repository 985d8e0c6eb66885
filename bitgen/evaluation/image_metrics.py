"""Similarity of images on 8-bit pixels: PSNR, SSIM, MS-SSIM."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num

from bitgen.errors import UserError

_TAPS, _SIGMA = 11, 1.5

_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2

# Of each scale, fine to coarse: Wang, Simoncelli and Bovik (2003).
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)

SSIM_SIDE = _TAPS  # the smallest image that the window fits in

MS_SSIM_SIDE = _TAPS * 2 ** (len(_WEIGHTS) - 1)  # the smallest image that has all scales


def psnr(a: Num[Array, "b H W c"], b: Num[Array, "b H W c"]) -> Float[Array, " b"]:
    """Returns 10 log10(255^2 / mean squared error) of each pair, pixels 0 to 255.

    Equal images get the PSNR of an error of 0.001, 78 dB.
    """
    _check(a, b)
    difference = a.astype(jnp.float32) - b.astype(jnp.float32)
    error = jnp.mean(jnp.square(difference), axis=(1, 2, 3))
    return 10 * jnp.log10(255.0**2 / jnp.maximum(error, 1e-3))


def ssim(a: Num[Array, "b H W c"], b: Num[Array, "b H W c"]) -> Float[Array, " b"]:
    """Returns the SSIM of each pair, pixels 0 to 255 (Wang et al. 2004).

    Gaussian window of 11 taps with deviation 1.5, where it lies inside the image; mean over
    positions and channels, as in torchmetrics and TensorFlow. Raises UserError below 11 pixels a
    side.
    """
    _check(a, b, _TAPS)
    luminance, contrast = _terms(a.astype(jnp.float32), b.astype(jnp.float32))
    return jnp.mean(luminance * contrast, axis=(1, 2, 3))


def ms_ssim(a: Num[Array, "b H W c"], b: Num[Array, "b H W c"]) -> Float[Array, " b"]:
    """Returns the multi-scale SSIM of each pair, pixels 0 to 255.

    Five scales, negative terms cut to 0, mean over channels. Raises UserError below 176 pixels.
    """
    _check(a, b, MS_SSIM_SIDE)
    x, y = a.astype(jnp.float32), b.astype(jnp.float32)
    product = jnp.ones((x.shape[0], x.shape[-1]))
    for scale, weight in enumerate(_WEIGHTS):
        if scale:
            x, y = (_halve(z) for z in (x, y))
        luminance, contrast = _terms(x, y)
        last = scale == len(_WEIGHTS) - 1
        term = jnp.mean(luminance * contrast if last else contrast, axis=(1, 2))
        product = product * jnp.maximum(term, 0) ** weight
    return jnp.mean(product, axis=1)


def _check(a: Any, b: Any, side: int = 1) -> None:
    if a.shape != b.shape or a.ndim != 4:
        raise UserError(
            f"two images to compare need one shape [b, H, W, c], got {a.shape} and {b.shape}"
        )
    if min(a.shape[1:3]) < side:
        raise UserError(f"this metric needs {side} pixels a side at least, got {a.shape}")


def _terms(x: Array, y: Array) -> tuple[Array, Array]:
    """Returns the luminance and contrast-structure terms, [b, h, w, c]."""
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return luminance, (2 * covariance + _C2) / (var_x + var_y + _C2)


def _blur(x: Array) -> Array:
    """Applies the Gaussian window where it lies inside the image."""
    offsets = np.arange(_TAPS) - _TAPS // 2
    taps = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    taps = jnp.asarray(taps / taps.sum(), jnp.float32)
    channels = x.shape[-1]
    for shape in ((_TAPS, 1), (1, _TAPS)):
        kernel = jnp.broadcast_to(taps.reshape(*shape, 1, 1), (*shape, 1, channels))
        x = jax.lax.conv_general_dilated(
            x,
            kernel,
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=channels,
            precision=jax.lax.Precision.HIGHEST,
        )
    return x


def _halve(x: Array) -> Array:
    window = (1, 2, 2, 1)
    return jax.lax.reduce_window(x, 0.0, jax.lax.add, window, window, "VALID") / 4
