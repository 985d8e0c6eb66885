"""BiGR's zero-shot edits of a user's picture: their settings, and which tokens are drawn again.

Inpainting, outpainting, class-conditional editing, class interpolation and enrichment (Hao et al.,
arXiv 2410.14672). Unlike in the reference, exactly the masked tokens are drawn, on the schedule of
their own number, and a known token never changes.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, UInt8
from PIL import Image

from bitgen.errors import UserError
from bitgen.generators.bigr import BiGR
from bitgen.images.decode import center_crop
from bitgen.images.editing import crop_area, reduced_view, require_opencv
from bitgen.images.inputs import box_area, read_area, read_picture
from bitgen.labels import class_names_of, parse_labels
from bitgen.runtime.logging import log_info
from bitgen.samplers import redraw
from bitgen.samplers.masked import MaskedPlan

Cell = tuple[str, UInt8[np.ndarray, "S S 3"]]  # a caption and a picture


@dataclasses.dataclass(frozen=True)
class Kind:
    """The fields of `config.edit` that a kind of edit reads, and the defaults of BiGR's script."""

    needs: tuple[str, ...]
    takes: tuple[str, ...] = ()  # beyond those that it needs
    variants: int = 8
    iterations: int = 25
    guidance: float = 2.5
    order: str = "linear"


KINDS = {
    "inpaint": Kind(("image", "area"), ("label", "blend")),
    "outpaint": Kind(("image", "area"), ("label", "blend")),
    "edit": Kind(("image", "area", "label"), ("blend",)),
    "interpolate": Kind(("labels",), variants=1, iterations=20, order="cosine"),
    "enrich": Kind(("image",), ("label",), variants=1, iterations=20, guidance=10.0),
}


@dataclasses.dataclass(frozen=True)
class EditInput:
    """The user's picture and the area marked on it, for kinds that need them."""

    picture: Image.Image | None = None
    area: Bool[np.ndarray, "H W"] | None = None


@dataclasses.dataclass(frozen=True)
class EditResult:
    """The images of an edit, and the inputs that they were made from."""

    images: UInt8[np.ndarray, "i S S 3"]
    details: list[dict[str, Any]]  # of each image: variant, and ratio or round
    inputs: list[Cell]  # what the model saw
    labels: list[int]
    job: redraw.RedrawJob
    plan: MaskedPlan


def edit_picture(
    config: Any, source: EditInput, generator: Any, tokenizer: Any, mesh: Mesh, mask: Any = None
) -> EditResult:
    """Returns the edit that `config.edit` describes; call `check_settings` first.

    Args:
      config: its `edit`, `sampler` and `seed` are read.
      source: the picture and the area.
      generator: a loaded BiGR.
      tokenizer: a loaded tokenizer.
      mesh: devices that share the work.
      mask: tokens to draw, bool [h, w]; by default those of the area.

    Raises UserError for a generator of another family, classes that it does not have, and an area
    that marks no token or all of them.
    """
    settings = config.edit
    if not isinstance(generator.module, BiGR):
        raise UserError(
            f"edit needs a bigr generator, {generator.path} is a {generator.info['family']}"
        )
    labels = read_labels(settings, generator)
    size = tokenizer.module.image_size
    if mask is None and source.area is not None:
        mask = token_mask(settings.kind, source.area, size, generator.module.grid)
    known, inputs = encode_input(settings, source, tokenizer, mesh)
    if mask is not None:
        inputs.insert(1, ("redrawn", _picture_of(mask, size)))
    job, details = plan_edit(config, generator, labels, known, mask)
    if settings.guidance > 1 and not labels:
        log_info("no class is given, so there is nothing to guide towards: guidance is off")
    plan = make_edit_plan(config, guided=bool(labels))
    _, images = redraw.redraw_images(
        generator, tokenizer, job, plan, mesh, seed=config.seed, batch_size=settings.batch_size
    )
    images = images.reshape(-1, *images.shape[2:])
    return EditResult(images, details, inputs, labels, job, plan)


# ------------------------------------------------------------------------------------- settings
def check_settings(settings: Any, kind: Kind) -> None:
    """Raises UserError for fields of `config.edit` that are missing, unused or out of range."""
    given = {
        "image": settings.image,
        "area": settings.mask or settings.box,
        "label": settings.label,
        "labels": settings.labels,
        "blend": settings.blend,
    }
    spelled = {name: f"config.edit.{name}" for name in given}
    spelled["area"] = "config.edit.mask or config.edit.box"
    for name, value in given.items():
        if name in kind.needs and not value:
            raise UserError(f"{settings.kind} needs {spelled[name]}")
        if value and name not in kind.needs + kind.takes:
            raise UserError(f"{settings.kind} does not use {spelled[name]}: leave it out")
    if settings.mask and settings.box:
        raise UserError("give config.edit.mask or config.edit.box, not both")
    least = {"variants": 0, "iterations": 0, "guidance": 0, "gumbel": 0, "steps": 0}
    for name, low in {**least, "rounds": 1, "batch_size": 1, "downsample": 2}.items():
        if settings[name] < low:
            raise UserError(f"config.edit.{name} must be {low} or more, got {settings[name]}")
    if settings.steps == 1:
        raise UserError("config.edit.steps must be 2 or more, or 0 for the steps of BiGR")
    if settings.blend:
        require_opencv()


def read_input(settings: Any, kind: Kind) -> EditInput:
    """Returns the picture, and the area that the mask or the box marks on it.

    Raises UserError if a file cannot be read, the mask and the picture differ in size, the box is
    not inside the picture, or nothing is marked.
    """
    if "image" not in kind.needs:
        return EditInput()
    picture = read_picture(settings.image)
    if "area" not in kind.needs:
        return EditInput(picture)
    if settings.box:
        return EditInput(picture, box_area(settings.box, picture))
    area = read_area(settings.mask, picture)
    if not area.any():
        raise UserError(f"the mask {settings.mask} marks nothing: paint the area white")
    return EditInput(picture, area)


def read_labels(settings: Any, generator: Any) -> list[int]:
    """Returns the classes of `config.edit.label` or `labels`; [] is the null class.

    Raises UserError for a class that the generator does not have, or a wrong number of classes.
    """
    name, count = ("labels", 2) if settings.kind == "interpolate" else ("label", 1)
    if not settings[name]:
        return []
    names = class_names_of(generator.info)
    labels = parse_labels(settings[name], generator.module.num_classes, names).tolist()
    if len(labels) != count:
        raise UserError(
            f"config.edit.{name} takes {count} of the model's classes, got {settings[name]!r}"
        )
    return labels


def make_edit_plan(config: Any, guided: bool) -> MaskedPlan:
    """Returns the sampler's settings, from `config.edit`, the kind of edit or `config.sampler`."""
    settings, kind = config.edit, KINDS[config.edit.kind]
    fields = {
        **config.sampler,
        "iterations": settings.iterations or kind.iterations,
        # Guiding the null class away from itself changes nothing and costs twice as much.
        "guidance": (settings.guidance or kind.guidance) if guided else 1.0,
        "order": settings.order or kind.order,
        "gumbel": settings.gumbel,
    }
    return MaskedPlan(**fields)


# --------------------------------------------------------------------------------------- drawing
def encode_input(
    settings: Any, source: EditInput, tokenizer: Any, mesh: Mesh
) -> tuple[Bool[np.ndarray, "h w k"], list[Cell]]:
    """Returns the bits to start from, and pictures of the model's input."""
    module = tokenizer.module
    if source.picture is None:
        return np.zeros((*module.grid, module.bits), bool), []
    cells = [("original", center_crop(source.picture, module.image_size))]
    if settings.kind == "enrich":
        rate = settings.downsample
        view = reduced_view(source.picture, module.image_size, rate)
        cells.append((f"1/{rate} resolution", view))
    bits, decoded = redraw.encode_view(module, tokenizer.params, cells[-1][1], mesh)
    return bits, [*cells, ("reconstruction", decoded)]


def token_mask(
    kind: str, area: Bool[np.ndarray, "H W"], size: int, grid: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """Returns the tokens to draw for an area of a picture that is cropped to `size` x `size`.

    These are the tokens in the area or, for outpainting, all others. Raises UserError if the area
    marks no token or all of them.
    """
    marked = redraw.cells_of(crop_area(area, size), grid)
    cells = f"{grid[0]}x{grid[1]} tokens of the centre crop"
    if not marked.any():
        raise UserError(f"the marked area holds none of the {cells}: make it larger, or move it")
    if marked.all():
        nothing = "nothing is left to draw" if kind == "outpaint" else "nothing is left to keep"
        raise UserError(f"the marked area holds all {cells}: {nothing}; make it smaller")
    return ~marked if kind == "outpaint" else marked


def plan_edit(
    config: Any,
    generator: Any,
    labels: list[int],
    known: Bool[np.ndarray, "h w k"],
    mask: Any,
) -> tuple[redraw.RedrawJob, list[dict[str, Any]]]:
    """Returns the job for the sampler, and a name for each image that it makes.

    `mask` [h, w] has the tokens to draw, for kinds that take an area.
    """
    settings, module = config.edit, generator.module
    details: list[dict[str, Any]] = [{}]  # of the images of one variant
    if settings.kind == "interpolate":
        ratios = redraw.mixing_ratios(settings.steps)
        classes = redraw.mix_classes(module, generator.params, labels[0], labels[1], ratios)
        details = [{"ratio": round(float(ratio), 4)} for ratio in ratios]
        rounds = [[np.ones(module.grid, bool)]]
    else:
        label = jnp.array(labels or [module.num_classes])
        classes = module.apply({"params": generator.params}, label, method="embed_labels")
        rounds = [[mask]]
    if settings.kind == "enrich":
        # All variants share an order of the blocks, which differs from round to round.
        rngs = [np.random.default_rng([config.seed, i]) for i in range(settings.rounds)]
        rounds = [redraw.block_masks(module.grid, settings.downsample, rng) for rng in rngs]
        details = [{"round": i + 1} for i in range(settings.rounds)]
    variants = settings.variants or KINDS[settings.kind].variants
    job = redraw.RedrawJob(
        classes=jnp.tile(classes, (variants, 1)),
        # All mixtures of one variant share its key.
        indices=np.repeat(np.arange(variants), len(classes)),
        known=known,
        rounds=rounds,
    )
    return job, [{"variant": i, **detail} for i in range(variants) for detail in details]


def _picture_of(mask: Bool[np.ndarray, "h w"], size: int) -> UInt8[np.ndarray, "S S 3"]:
    image = Image.fromarray(mask.astype(np.uint8) * 255).convert("RGB")
    return np.asarray(image.resize((size, size), Image.Resampling.NEAREST))
