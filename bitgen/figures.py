"""Pictures to look at: grids with captions, training curves, planes of bits, animations.

All are uint8 `[H, W, 3]`.
"""

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageFont

from bitgen.data.images import grid
from bitgen.data.pictures import sheet
from bitgen.errors import UserError
from bitgen.evaluation.plot import plot

_CAPTION = 124  # pixels of the narrowest cell of a sheet, less a margin
_PLANES = 8  # in a row
_CELL = 64  # smallest side of an image in an animation
_LAST = 1500  # milliseconds that an animation rests at its end
# Of metrics.jsonl: how the run went, not what was learned.
_SPEED = ("step", "data_wait", "images_per_second", "mfu")


def captioned_grid(
    images: UInt8[np.ndarray, "n S S 3"], captions: Sequence[str], columns: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns images in rows of `columns`, each below its caption, which is cut if it is long."""
    if columns < 1 or len(images) != len(captions) or not len(images):
        raise UserError(
            f"a captioned grid takes a caption an image and a column at least, got {len(images)} "
            f"images, {len(captions)} captions, {columns} columns"
        )
    width = max(_CAPTION, images.shape[2])
    cells = [(_cut(text, width), image) for text, image in zip(captions, images, strict=True)]
    return sheet([cells[i : i + columns] for i in range(0, len(cells), columns)])


def bit_planes(
    bits: Bool[np.ndarray, "h w k"], image: UInt8[np.ndarray, "S S 3"] | None = None
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the planes of a code, a bit of every token each, white where it is set.

    `image`, what the code stands for, comes before them. Of a tokenizer of several scales, give
    the bits of one.
    """
    bits = np.asarray(bits)
    if bits.ndim != 3 or bits.dtype != bool:
        raise UserError(f"planes are of bool [h, w, k], got {bits.dtype} {list(bits.shape)}")
    side = max(bits.shape[:2]) if image is None else len(image)
    cells = []
    for i in range(bits.shape[-1]):
        plane = Image.fromarray(bits[..., i].astype(np.uint8) * 255).convert("RGB")
        plane = plane.resize((side, side), Image.Resampling.NEAREST)
        cells.append((f"bit {i}, {bits[..., i].mean():.0%}", np.asarray(plane)))
    rows = [] if image is None else [[("image", image)]]
    return sheet(rows + [cells[i : i + _PLANES] for i in range(0, len(cells), _PLANES)])


def training_curves(
    metrics: str | os.PathLike, names: Sequence[str] = (), columns: int = 3
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a plot of each metric of `metrics.jsonl` over steps.

    Args:
      metrics: the file, or the workdir that it is in.
      names: of the metrics; all but speeds by default.
      columns: of the page.

    Raises UserError if the file cannot be read or has none of the metrics.
    """
    path = Path(metrics)
    path = path / "metrics.jsonl" if path.is_dir() else path
    try:
        rows = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    except OSError as e:
        raise UserError(f"cannot read {path}: {e.strerror}") from None
    except ValueError as e:
        raise UserError(f"{path} is damaged: {e}") from None
    if not all(isinstance(row, dict) and "step" in row for row in rows):
        raise UserError(f"{path} holds no metrics of a run: a line without a step")
    found = {name: None for row in rows for name in row if name not in _SPEED}
    for name in names:
        if not any(name in row for row in rows):
            raise UserError(f"{path} has no metric {name!r}, have {sorted(found)}")
    panels = []
    for name in names or found:
        # A run that was resumed may have written a step again: the last counts.
        points = {row["step"]: row[name] for row in rows if isinstance(row.get(name), int | float)}
        if points:
            line = sorted(points.items())
            panels.append(plot(line, [""] * len(line), "step", name, dots=len(line) < 20))
    if not panels:
        raise UserError(f"{path} has no numbers yet")
    columns = min(columns, len(panels))
    panels += [np.full_like(panels[0], 255)] * (-len(panels) % columns)
    return grid(np.stack(panels), columns)


def sampling_frames(
    steps: Iterable[tuple[UInt8[np.ndarray, "b S S 3"], Bool[np.ndarray, "b h w"]]], columns: int
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Returns a picture of each step of `samplers.steps.image_steps`, small images enlarged."""
    frames = []
    for images, _ in steps:
        scale = -(-_CELL // images.shape[1])
        frames.append(grid(np.repeat(np.repeat(images, scale, 1), scale, 2), columns))
    return frames


def write_animation(
    path: str | os.PathLike, frames: Sequence[UInt8[np.ndarray, "H W 3"]], milliseconds: int = 120
) -> None:
    """Writes NAME.gif or NAME.webp, whole or not at all; it rests at the last frame, and repeats.

    Raises UserError for another name, no frames, or frames of different sizes.
    """
    path = Path(path)
    check_animation(path)
    if not len(frames) or len({frame.shape for frame in frames}) != 1:
        raise UserError(f"{path}: an animation takes frames of one size, at least one")
    pages = [Image.fromarray(frame) for frame in frames]
    times = [milliseconds] * (len(pages) - 1) + [_LAST]
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"lossless": True} if path.suffix == ".webp" else {"optimize": True}
    try:
        pages[0].save(
            part,
            format=path.suffix[1:],
            save_all=True,
            append_images=pages[1:],
            duration=times,
            loop=0,
            **options,
        )
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def check_animation(path: Path) -> None:
    """Raises UserError unless an animation can have this name."""
    if path.suffix not in (".gif", ".webp"):
        raise UserError(f"an animation is NAME.gif or NAME.webp, not {path.name}")


def _cut(text: str, width: int) -> str:
    """-> the text without what goes beyond a width in the font of `sheet`."""
    font = ImageFont.load_default(size=13)
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text.rstrip()}..."
