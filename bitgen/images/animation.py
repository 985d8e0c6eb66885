"""Animations of the sampler, as GIF or WebP."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from bitgen.errors import UserError
from bitgen.files import atomic_path
from bitgen.images.grids import grid

_CELL = 64  # smallest side of an image in an animation

_LAST = 1500  # milliseconds that an animation rests at its end


def sampling_frames(
    steps: Iterable[tuple[UInt8[np.ndarray, "b S S 3"], Bool[np.ndarray, "b h w"]]], columns: int
) -> list[UInt8[np.ndarray, "H W 3"]]:
    """Returns a grid of the images after each step, small images enlarged.

    `steps` is what `samplers.progressive.progressive_images` yields.
    """
    frames = []
    for images, _ in steps:
        scale = -(-_CELL // images.shape[1])
        frames.append(grid(np.repeat(np.repeat(images, scale, 1), scale, 2), columns))
    return frames


def write_animation(
    path: str | os.PathLike, frames: Sequence[UInt8[np.ndarray, "H W 3"]], milliseconds: int = 120
) -> None:
    """Writes NAME.gif or NAME.webp, which repeats and pauses at its last frame.

    Raises UserError for another name, no frames, or frames of different sizes.
    """
    path = Path(path)
    check_animation(path)
    if not len(frames) or len({frame.shape for frame in frames}) != 1:
        raise UserError(f"{path}: an animation takes frames of one size, at least one")
    pages = [Image.fromarray(frame) for frame in frames]
    times = [milliseconds] * (len(pages) - 1) + [_LAST]
    options = {"lossless": True} if path.suffix == ".webp" else {"optimize": True}
    with atomic_path(path) as part:
        pages[0].save(
            part,
            format=path.suffix[1:],
            save_all=True,
            append_images=pages[1:],
            duration=times,
            loop=0,
            **options,
        )


def check_animation(path: Path) -> None:
    """Raises UserError unless the name is one of an animation."""
    if path.suffix not in (".gif", ".webp"):
        raise UserError(f"an animation is NAME.gif or NAME.webp, not {path.name}")
