"""Inspection of tokenizers: their size and error on a picture, and the bits of one token."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from bitgen.demo.actions import Cell, Tools
from bitgen.demo.uploads import Pixels, as_shown, chosen
from bitgen.errors import UserError
from bitgen.evaluation.image_metrics import psnr
from bitgen.images.decode import center_crop
from bitgen.images.grids import bit_planes

_GAIN = 4  # of difference maps

_MARK = (255, 120, 0)


def compare(tools: Tools, picture: Image.Image | None) -> tuple[list[list[str]], list[Cell]]:
    """Returns a row for each tokenizer (name, pixels, bits, bits a pixel, PSNR), and pictures."""
    picture = chosen(picture)
    rows, cells = [], []
    for name, pipeline in tools.tokenizers.items():
        size = pipeline.image_size
        view = center_crop(picture, size)
        codes = pipeline.encode(view)
        made = pipeline.decode(codes)[0]
        error = float(psnr(jnp.asarray(view[None]), jnp.asarray(made[None]))[0])
        if pipeline.tokenizer.module.bits:
            bits = sum(part[0].size for part in jax.tree.leaves(codes))
            price = [f"{bits:,}", f"{bits / size**2:.3f}"]
        else:
            numbers = sum(part[0].size for part in jax.tree.leaves(codes))
            price = [f"none: {numbers:,} continuous numbers", "-"]
        rows.append([name, f"{size} x {size}", *price, f"{error:.2f}"])
        map_ = difference(view, made)
        cells += [(as_shown(view), f"{name}: picture"), (as_shown(made), "reconstruction")]
        cells.append((as_shown(map_), f"difference, {_GAIN} times"))
    return rows, cells


def difference(a: Pixels, b: Pixels) -> Pixels:
    """Returns the difference of two pictures at each pixel, the mean of the channels, amplified."""
    apart = np.abs(a.astype(np.float32) - b.astype(np.float32)).mean(-1, keepdims=True)
    return np.repeat(np.clip(apart * _GAIN, 0, 255).astype(np.uint8), 3, axis=-1)


@dataclasses.dataclass(frozen=True)
class Token:
    """One token of a picture's code."""

    board: Pixels  # the reconstruction, the token framed
    planes: Pixels  # of all tokens
    words: str  # the token's bits
    flipped: list[Cell]  # what one bit does


def look_at_token(
    tools: Tools,
    picture: Image.Image | None,
    row: int,
    column: int,
    bit: int,
    scale: int = -1,
) -> Token:
    """Returns the bits of a token and of the whole picture, and the effect of flipping one of them.

    `scale` chooses the scale of a tokenizer with several, from coarse to fine. Raises UserError for
    a token or bit that does not exist, and for a tokenizer with continuous latents.
    """
    pipeline = tools.pipeline
    if not pipeline.tokenizer.module.bits:
        raise UserError("this tokenizer gives continuous latents: it has no bits to look at")
    codes = pipeline.encode(center_crop(chosen(picture), pipeline.image_size))
    scales = list(codes) if isinstance(codes, tuple) else [codes]
    bits = scales[scale][0]
    h, w, k = bits.shape
    for what, value, limit in (("row", row, h), ("column", column, w), ("bit", bit, k)):
        if not 0 <= value < limit:
            raise UserError(f"there is no {what} {value}: choose from 0 to {limit - 1}")
    made = pipeline.decode(codes)[0]
    other = [part.copy() for part in scales]
    other[scale][0, row, column, bit] ^= True
    changed = pipeline.decode(tuple(other) if isinstance(codes, tuple) else other[0])[0]
    text = "".join("1" if on else "0" for on in bits[row, column])
    groups = " ".join(text[i : i + 8] for i in range(0, k, 8))
    return Token(
        board=framed(made, (h, w), row, column),
        planes=bit_planes(bits),
        words=f"token in row {row}, column {column}: {groups}",
        flipped=[
            (as_shown(made), "reconstruction"),
            (as_shown(changed), f"bit {bit} flipped"),
            (as_shown(difference(made, changed)), f"difference, {_GAIN} times"),
        ],
    )


def framed(image: Pixels, grid: tuple[int, int], row: int, column: int) -> Pixels:
    """Returns an enlarged image with a frame around one cell of a grid."""
    board = as_shown(image)
    height, width = board.shape[:2]
    top, bottom = (i * height // grid[0] for i in (row, row + 1))
    left, right = (i * width // grid[1] for i in (column, column + 1))
    inside = board[top + 3 : bottom - 3, left + 3 : right - 3].copy()
    board[top:bottom, left:right] = _MARK
    board[top + 3 : bottom - 3, left + 3 : right - 3] = inside
    return board


def token_at(place: Sequence[int], grid: tuple[int, int], size: tuple[int, int]) -> tuple[int, int]:
    """Returns row and column of the token at a pixel (x, y) of a picture of `size` (w, h)."""
    column, row = (
        min(int(at) * cells // pixels, cells - 1)
        for at, cells, pixels in zip(place, (grid[1], grid[0]), size, strict=True)
    )
    return row, column
