"""Uploaded pictures, the area that the brush painted, and their size on the page."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from bitgen.errors import UserError
from bitgen.images import editing, inputs

Pixels = UInt8[np.ndarray, "H W 3"]

_SHOWN = (384, 768)  # least and most pixels of the longer side on the page


@dataclasses.dataclass(frozen=True)
class Limits:
    """The limits of one request."""

    images: int = 16
    megabytes: float = 20.0
    megapixels: float = 40.0


def read_upload(path: str | None, limits: Limits) -> Image.Image:
    """Returns an uploaded picture; raises UserError if it is no picture or too large."""
    if not path:
        raise UserError("no picture was chosen")
    name = Path(path).name
    if Path(path).stat().st_size > limits.megabytes * 1e6:
        raise UserError(f"{name} is larger than {limits.megabytes:g} MB: choose a smaller file")
    try:
        with Image.open(path) as header:
            pixels = header.width * header.height
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels = np.inf
    except Exception as e:  # damaged headers raise much more than OSError
        raise UserError(
            f"{name} cannot be read as a picture: use JPEG, PNG, WebP, BMP or TIFF"
        ) from e
    if pixels > limits.megapixels * 1e6:
        raise UserError(f"{name} has more than {limits.megapixels:g} megapixels: reduce it")
    try:
        return inputs.read_picture(path)
    except UserError as e:
        raise UserError(str(e).replace(path, name)) from None


def shown(picture: Image.Image) -> Image.Image:
    """Returns a picture enlarged to a size to view and paint on."""
    longer = max(picture.size)
    least, most = _SHOWN
    if longer < least:
        scale = -(-least // longer)
        size = (picture.width * scale, picture.height * scale)
        return picture.resize(size, Image.Resampling.NEAREST)
    if longer > most:
        size = (
            max(round(picture.width * most / longer), 1),
            max(round(picture.height * most / longer), 1),
        )
        return picture.resize(size, Image.Resampling.LANCZOS)
    return picture


def as_shown(image: Pixels) -> Pixels:
    """Returns pixels enlarged to a size to view."""
    return np.array(shown(Image.fromarray(np.asarray(image))))


def chosen(picture: Image.Image | None) -> Image.Image:
    """Returns the picture; raises UserError if there is none."""
    if picture is None:
        raise UserError("choose a picture first")
    return picture


def area_painted(layers: Sequence[Any] | None, picture: Image.Image) -> Bool[np.ndarray, "H W"]:
    """Returns where the brush painted: where a layer (RGBA) is not transparent.

    Raises UserError if nothing is painted.
    """
    area = np.zeros((picture.height, picture.width), bool)
    for layer in layers or ():
        alpha = Image.fromarray(np.asarray(layer)).convert("RGBA").getchannel("A")
        area |= np.asarray(alpha.resize(picture.size, Image.Resampling.NEAREST)) >= 128
    if not area.any():
        raise UserError("no mask is drawn: paint on the picture with the brush first")
    return area


def tokens_painted(
    kind: str, area: Bool[np.ndarray, "H W"], size: int, grid: tuple[int, int]
) -> Bool[np.ndarray, "h w"]:
    """Returns the tokens that an area marks in the centre crop: all that the brush touches.

    For outpainting, tokens at least half painted are kept. Raises UserError if it marks none or
    all.
    """
    left, top, side = editing.crop_square(Image.fromarray(area.astype(np.uint8)), size)
    crop = area[top : top + side, left : left + side].astype(np.float32)
    share = np.asarray(Image.fromarray(crop).resize((grid[1], grid[0]), Image.Resampling.BOX))
    marked = share > 0.499 if kind == "outpaint" else share > 0
    if not marked.any():
        raise UserError(
            "the painted area covers no token: paint more, and inside of the centre square, "
            "which is all that the model sees"
        )
    if marked.all():
        raise UserError("everything is painted: leave some of the picture free")
    return marked
