"""Images through a tokenizer and back: errors, rFID, use of the bits, and pictures."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int, UInt8

from bitgen.errors import UserError
from bitgen.evaluation.features import Extractor, make_extractor
from bitgen.evaluation.frechet import frechet_distance
from bitgen.evaluation.image_metrics import MS_SSIM_SIDE, SSIM_SIDE, ms_ssim, psnr, ssim
from bitgen.evaluation.image_sets import pixels, read_share
from bitgen.evaluation.statistics import Moments
from bitgen.hub.model_directory import Model
from bitgen.images.pixels import from_uint8, to_uint8
from bitgen.losses.lpips import load_lpips, lpips_distance
from bitgen.runtime.distributed import gather_rows, local_rows, pad_rows, place
from bitgen.runtime.mesh import BATCH, replicated, round_up_batch, to_device
from bitgen.runtime.progress import with_progress_of_shares
from bitgen.runtime.watchdog import Watchdog, with_heartbeats

# A bit counts as dead if it is set, or not set, in a smaller share of the tokens than this.
RARE = 1e-6


@dataclass
class Metrics:
    """The metrics of a tokenizer beyond the errors of pixels."""

    lpips: Any  # parameters of `lpips_distance`, or None
    extractor: Extractor | None  # of rFID

    @property
    def digest(self) -> str | None:
        """The digest of the feature network's weights, if there is one."""
        return self.extractor.digest if self.extractor else None


@dataclass
class Reconstructions:
    """The result of a pass of images through a tokenizer."""

    values: dict[str, float]  # means over images by name, see `measure_tokenizer`
    # Pictures by name: original and reconstruction, uint8 [n, H, W, 3], and for bits `finest`, bool
    # [n, h, w, k], those of the last scale.
    shown: dict[str, np.ndarray]
    ones: Float[np.ndarray, "s k"]  # how often each bit of each scale is set; no scale: latents


def make_metrics(settings: Any, mesh: Mesh) -> Metrics:
    """Returns the metrics of `settings.protocol`, `.weights` and `.lpips`.

    Raises UserError if a file of weights is missing.
    """
    extractor = None
    if settings.protocol != "none":
        extractor = make_extractor(settings.protocol, settings.weights, mesh, settings.batch_size)
    return Metrics(load_lpips(settings.lpips) if settings.lpips else None, extractor)


def measure_data(
    tokenizer: Model,
    config_data: Any,
    settings: Any,
    mesh: Mesh,
    metrics: Metrics,
    watch: Watchdog,
    *,
    show: int = 0,
) -> Reconstructions:
    """Returns the round trip of a split of `config.data`, at the size of the tokenizer.

    `settings` has the `split`, the number of `images` at most, evenly spread over it (0: all), and
    the `batch_size`. `show` images, evenly spread too, are returned as pictures.
    """
    source = config_data.copy_and_resolve_references()
    source.image_size = tokenizer.module.image_size
    rows = round_up_batch(settings.batch_size, mesh) // jax.process_count()
    batches = read_share(source, settings.split, limit=settings.images, rows=rows)
    places = np.unique(np.arange(show) * batches.num_examples // max(show, 1))
    told = with_progress_of_shares(batches, "reconstructed", batches.num_examples)
    images = with_heartbeats(pixels(told), watch)
    return measure_tokenizer(tokenizer, images, mesh, metrics, rows=rows, show=places)


def measure_tokenizer(
    tokenizer: Model,
    batches: Iterable[UInt8[np.ndarray, "b H W 3"]],
    mesh: Mesh,
    metrics: Metrics,
    *,
    rows: int,
    show: Int[np.ndarray, " n"],
) -> Reconstructions:
    """Returns the round trip of images, which come in batches of at most `rows` per process.

    Its values: images (how many), psnr, l1, ssim, ms_ssim, lpips, rfid, and for bits bits_per_image
    and `bit_usage`. Reconstructions are rounded to 8 bits first. Metrics that were not requested
    are left out, and so are SSIM below 11 pixels a side and MS-SSIM below 176. `show` has the
    positions of the images to return as pictures. Each process gives its own rows of every batch,
    and all get the same result.
    """
    program = _program(tokenizer.module, mesh)
    variables = place((tokenizer.params, metrics.lpips), replicated(mesh))
    each: dict[str, list[np.ndarray]] = {}
    shown: dict[str, list[np.ndarray]] = {}
    extractor, count = metrics.extractor, 0
    moments = [Moments(extractor.size) for _ in range(2)] if extractor else []
    for images in batches:
        placed = to_device({"image": pad_rows(images, rows)}, mesh)
        values, made = program(*variables, placed["image"])
        if extractor:
            own = local_rows(made["reconstruction"])[: len(images)]
            for running, part in zip(moments, (images, own), strict=True):
                running.add(extractor(part)["pool"])
        values = gather_rows(values, len(images))
        for name, value in values.items():
            each.setdefault(name, []).append(value)
        indices = count + np.arange(len(values["psnr"]))
        chosen = np.isin(indices, show)
        if chosen.any():
            made = gather_rows({"original": placed["image"], **made}, len(images))
            for name, value in made.items():
                shown.setdefault(name, []).append(value[chosen])
        count += len(indices)
    if not count:
        raise UserError("there are no images to reconstruct: look at config.data")
    result: dict[str, float] = {"images": count}
    if extractor:
        result["rfid"] = frechet_distance(*(running.gaussian() for running in moments))
    means = {name: np.concatenate(value).mean(0, np.float64) for name, value in each.items()}
    ones = means.pop("ones", np.zeros((0, 0)))
    result |= {name: float(value) for name, value in means.items()}
    if len(ones):
        tokens = [h * w for h, w in _grids(tokenizer.module)]
        result["bits_per_image"] = sum(tokens) * tokenizer.module.bits
        result |= bit_usage(np.average(ones, axis=0, weights=tokens))
    pictures = {name: np.concatenate(value) for name, value in shown.items()}
    return Reconstructions(result, pictures, ones)


def through(
    module: Any, params: Any, images: UInt8[Array, "b H W 3"]
) -> tuple[Any, Float[Array, "b H W 3"]]:
    """Returns the codes of images, and their reconstructions, not clipped."""
    codes = module.apply({"params": params}, from_uint8(images), method="encode")
    return codes, module.apply({"params": params}, codes, method="decode")


def bit_usage(ones: Float[np.ndarray, " k"]) -> dict[str, float]:
    """Returns `bits_used` (a share), `bits_dead` (a number), and `bits_entropy` (the mean in bits).

    `ones` is the share of the tokens that have each bit set. The entropy is of each bit on its own.
    """
    used = (ones > RARE) & (ones < 1 - RARE)
    return {
        "bits_used": float(used.mean()),
        "bits_dead": float((~used).sum()),
        "bits_entropy": float((bit_entropy(ones) * used).mean()),
    }


def bit_entropy(ones: Float[np.ndarray, "*b"]) -> Float[np.ndarray, "*b"]:
    """Returns the entropy, in bits, of bits that are set with these probabilities."""
    q = np.clip(np.asarray(ones, np.float64), 1e-12, 1 - 1e-12)
    return -(q * np.log2(q) + (1 - q) * np.log2(1 - q))


def scale_names(module: Any) -> list[str]:
    """Returns a name for each scale of a tokenizer; none for a single scale."""
    grids = _grids(module)
    return [f"scale {i}, {h}x{w}" for i, (h, w) in enumerate(grids, 1)] if len(grids) > 1 else []


def _grids(module: Any) -> list[tuple[int, int]]:
    return list(getattr(module, "scales", ())) or [module.grid]


def _program(module: Any, mesh: Mesh) -> Any:
    """Returns f(params, lpips, images) -> values of each image, and its pictures."""

    def run(params, lpips, images):
        codes, decoded = through(module, params, images)
        made = to_uint8(decoded)
        values = {"psnr": psnr(images, made)}
        values["l1"] = jnp.mean(jnp.abs(images / 255.0 - made / 255.0), axis=(1, 2, 3))
        if min(images.shape[1:3]) >= SSIM_SIDE:
            values["ssim"] = ssim(images, made)
        if min(images.shape[1:3]) >= MS_SSIM_SIDE:
            values["ms_ssim"] = ms_ssim(images, made)
        if lpips is not None:
            values["lpips"] = lpips_distance(lpips, from_uint8(images), from_uint8(made))
        if not module.bits:
            return values, {"reconstruction": made}
        scales = jax.tree.leaves(codes)  # several, or one
        values["ones"] = jnp.stack([jnp.mean(x, (1, 2), jnp.float32) for x in scales], axis=1)
        return values, {"reconstruction": made, "finest": scales[-1]}

    return jax.jit(
        jax.shard_map(run, mesh=mesh, in_specs=(P(), P(), BATCH), out_specs=BATCH, check_vma=False)
    )
