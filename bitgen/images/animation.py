"""Animations of the sampler at work, as GIF or WebP."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from bitgen.errors import UserError
from bitgen.images.grids import grid

_CELL = 64  # smallest side of an image in an animation

_LAST = 1500  # milliseconds that an animation rests at its end


def sampling_frames(
    steps: Iterable[tuple[UInt8[np.ndarray, "b S S 3"], Bool[np.ndarray, "b h w"]]], columns: int
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Returns a picture of each step of `progressive_images`, small images enlarged."""
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
