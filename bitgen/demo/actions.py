"""The actions of the page, independent of gradio: pictures in, pictures and text out.

A cell is a picture with its caption. Bad input raises UserError; the page shows its message.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool
from PIL import Image

from bitgen.api import Pipeline
from bitgen.demo.uploads import Limits, Pixels, area_painted, as_shown, chosen, tokens_painted
from bitgen.errors import UserError
from bitgen.generators.bigr import BiGR
from bitgen.images import editing
from bitgen.images.grids import captioned_grid
from bitgen.samplers.redraw import mixing_ratios

Cell = tuple[Pixels, str]


@dataclasses.dataclass(frozen=True)
class Tools:
    """The models and settings that the page works with."""

    pipeline: Pipeline
    tokenizers: dict[str, Pipeline]  # to compare, by name; the pipeline's own first
    limits: Limits = dataclasses.field(default_factory=Limits)
    sampler: dict[str, Any] = dataclasses.field(default_factory=dict)  # settings of its plan
    preview_every: int = 1


def why_not(pipeline: Pipeline, what: str) -> str:
    """Returns why the models cannot 'draw' or 'edit'; '' if they can."""
    if pipeline.generator is None:
        return "This page was started without a generator, so nothing can be drawn."
    if what == "edit" and not isinstance(pipeline.generator.module, BiGR):
        family = pipeline.generator.info["family"]
        return (
            f"The generator is a {family}, which draws tokens in a fixed order and cannot keep "
            "some of them. Start the page with a bigr generator to edit pictures."
        )
    return ""


def generate(
    tools: Tools, labels: Sequence[int], count: int, seed: int, **settings: Any
) -> Iterator[tuple[Pixels, str]]:
    """Yields a sheet of `count` images of each class and a line on the progress, step by step."""
    if not len(labels):
        raise UserError("choose at least one class")
    rows = np.repeat(np.asarray(labels), _count(tools, count, len(labels)))
    names = tools.pipeline.class_names
    captions = [names[label] for label in rows]
    columns = count if count > 1 else min(len(rows), 5)
    steps = tools.pipeline.steps(
        rows, seed=seed, every=tools.preview_every, **{**tools.sampler, **settings}
    )
    for images, drawn in steps:
        done = f"{int(drawn[0].sum())} of {drawn[0].size} tokens drawn"
        yield captioned_grid(images, captions, columns), done


def redraw(
    tools: Tools,
    kind: str,
    picture: Image.Image | None,
    layers: Sequence[Any] | None,
    label: int | None,
    count: int,
    seed: int,
    **settings: Any,
) -> tuple[list[Cell], list[Cell]]:
    """Returns the picture with the drawn area pasted into it, and the model's whole output.

    In the first, only the painted area changes (for outpaint, only it stays).
    """
    picture = chosen(picture)
    if kind == "edit" and label is None:
        raise UserError("choose the class to edit to")
    pipeline = tools.pipeline
    area = area_painted(layers, picture)
    tokens = tokens_painted(kind, area, pipeline.image_size, pipeline.grid)
    images = pipeline.edit(
        picture,
        kind,
        mask=tokens,
        label=label,
        seed=seed,
        sampler=tools.sampler,
        variants=_count(tools, count),
        **settings,
    )
    laid = [lay_in(kind, picture, area, image) for image in images]
    names = [f"variant {i + 1}" for i in range(len(images))]
    return (
        [(as_shown(image), name) for image, name in zip(laid, names, strict=True)],
        [(as_shown(image), name) for image, name in zip(images, names, strict=True)],
    )


def lay_in(kind: str, picture: Image.Image, area: Bool[np.ndarray, "H W"], view: Pixels) -> Pixels:
    """Returns the user's picture with the pixels of the drawn view in the area."""
    left, top, side = square = editing.crop_square(picture, len(view))
    seen = np.zeros_like(area)
    seen[top : top + side, left : left + side] = True
    changed = seen & (~area if kind == "outpaint" else area)
    drawn = editing.paste_crop(picture, square, view)
    return np.where(changed[..., None], drawn, np.asarray(picture))


def interpolate(
    tools: Tools, first: int | None, second: int | None, steps: int, seed: int, **settings: Any
) -> list[Cell]:
    """Returns images between two classes, with one seed."""
    if first is None or second is None:
        raise UserError("choose two classes")
    steps = _count(tools, steps)
    if steps < 2:
        raise UserError("an interpolation needs at least 2 images")
    images = tools.pipeline.edit(
        None,
        "interpolate",
        labels=[first, second],
        steps=steps,
        seed=seed,
        sampler=tools.sampler,
        **settings,
    )
    names = [tools.pipeline.class_names[label] for label in (first, second)]
    captions = [f"{share:.0%} {names[1]}, {1 - share:.0%} {names[0]}" for share in
                mixing_ratios(steps)]  # fmt: skip
    return [(as_shown(image), text) for image, text in zip(images, captions, strict=True)]


def enrich(
    tools: Tools,
    picture: Image.Image | None,
    label: int | None,
    downsample: int,
    rounds: int,
    seed: int,
    **settings: Any,
) -> list[Cell]:
    """Returns the picture, its reduced view, and the result of each round of redrawing."""
    drawn = tools.pipeline.drawn(
        chosen(picture),
        "enrich",
        label=label,
        downsample=downsample,
        rounds=_count(tools, rounds),
        seed=seed,
        sampler=tools.sampler,
        **settings,
    )
    cells = [(as_shown(image), name) for name, image in drawn.inputs]
    return cells + [(as_shown(image), f"round {i + 1}") for i, image in enumerate(drawn.images)]


def example(tools: Tools, label: int, seed: int) -> Image.Image:
    """Returns a picture drawn by the generator, to try the page with."""
    *_, (images, _) = tools.pipeline.steps([label], seed=seed, every=1000, **tools.sampler)
    return Image.fromarray(images[0])


def _count(tools: Tools, count: int, times: int = 1) -> int:
    """Returns a number of images within the limit of one request."""
    if count < 1 or count * times > tools.limits.images:
        raise UserError(
            f"this page draws 1 to {tools.limits.images} images at a time, not {count * times}: "
            "ask for fewer"
        )
    return count
