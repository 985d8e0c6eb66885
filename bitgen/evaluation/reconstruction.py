"""How close reconstructions are, on 8-bit pixels: PSNR, SSIM, MS-SSIM, LPIPS of each, and rFID."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Num, UInt8

from bitgen.distributed import gather, place
from bitgen.errors import UserError
from bitgen.evaluation.features import Extractor, own_rows, pad_rows
from bitgen.evaluation.frechet import frechet_distance
from bitgen.evaluation.statistics import Moments, merge_over_hosts
from bitgen.losses.lpips import lpips_distance
from bitgen.mesh import BATCH, replicated, to_device
from bitgen.pixels import from_uint8, to_uint8

_TAPS, _SIGMA = 11, 1.5
_C1, _C2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
# Of each scale, fine to coarse: Wang, Simoncelli and Bovik (2003).
_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MS_SSIM_SIDE = _TAPS * 2 ** (len(_WEIGHTS) - 1)  # the smallest image that has all scales


def measure_tokenizer(
    tokenizer: Any,
    params: Any,
    batches: Iterable[UInt8[np.ndarray, "b H W 3"]],
    mesh: Mesh,
    *,
    rows: int,
    lpips: Any = None,
    extractor: Extractor | None = None,
) -> dict[str, float]:
    """Returns means over images by name: images, psnr, l1, ssim, ms_ssim, lpips, and rfid of all.

    Reconstructions are rounded to 8 bits first. lpips: parameters of `lpips_distance`; without
    them, and without an extractor, what needs them is left out, and so is SSIM below 11 pixels a
    side and MS-SSIM below 176. `batches` have at most `rows` images, which the devices divide.
    Over several processes each gives its own rows of every batch, and all get the same means.
    """
    program = _reconstructor(tokenizer, mesh)
    variables = place((params, lpips), replicated(mesh))
    values: dict[str, list[np.ndarray]] = {}
    moments = [Moments(extractor.size) for _ in range(2)] if extractor else []
    count = 0
    for images in batches:
        real = len(images)
        placed = to_device({"image": pad_rows(images, rows)}, mesh)
        found = {name: own_rows(x) for name, x in program(*variables, placed["image"]).items()}
        reconstructions = found.pop("reconstruction")[:real]
        mask = gather(np.arange(rows) < real)
        for name, each in found.items():
            values.setdefault(name, []).append(gather(each)[mask])
        if extractor:
            for running, part in zip(moments, (images, reconstructions), strict=True):
                running.add(extractor(part)["pool"])
        count += int(mask.sum())
    if not count:
        raise UserError("there are no images to reconstruct: look at config.data")
    result: dict[str, float] = {"images": count}
    if extractor:
        both = (merge_over_hosts(running).gaussian() for running in moments)
        result["rfid"] = frechet_distance(*both)
    return result | {name: float(np.concatenate(each).mean()) for name, each in values.items()}


def _reconstructor(tokenizer: Any, mesh: Mesh) -> Any:
    def reconstruct(params, lpips, images):
        codes = tokenizer.apply({"params": params}, from_uint8(images), method="encode")
        made = to_uint8(tokenizer.apply({"params": params}, codes, method="decode"))
        found = {"reconstruction": made, "psnr": psnr(images, made)}
        found["l1"] = jnp.mean(jnp.abs(images / 255.0 - made / 255.0), axis=(1, 2, 3))
        if min(images.shape[1:3]) >= _TAPS:
            found["ssim"] = ssim(images, made)
        if min(images.shape[1:3]) >= MS_SSIM_SIDE:
            found["ms_ssim"] = ms_ssim(images, made)
        if lpips is not None:
            found["lpips"] = lpips_distance(lpips, from_uint8(images), from_uint8(made))
        return found

    return jax.jit(
        jax.shard_map(
            reconstruct, mesh=mesh, in_specs=(P(), P(), BATCH), out_specs=BATCH, check_vma=False
        )
    )


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

    Gaussian window of 11 taps and deviation 1.5 where it fits, mean over places and channels, as
    torchmetrics and TensorFlow compute it. Raises UserError below 11 pixels a side.
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
    """-> luminance and contrast-structure terms, [b, h, w, c]."""
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    return luminance, (2 * covariance + _C2) / (var_x + var_y + _C2)


def _blur(x: Array) -> Array:
    """The Gaussian window where it lies inside of the image."""
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
