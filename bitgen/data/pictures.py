"""The user's own picture: reading it and the area marked on it, blending into it, a labelled sheet.

Pixels are uint8 `[H, W, 3]`, areas bool `[H, W]`.
"""

import io
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image, ImageDraw, ImageFont, ImageOps

from bitgen.data.images import BrokenImage, center_crop, decode, resize_shorter
from bitgen.errors import UserError

_LABEL = 18  # pixels of a cell's label
_GAP = 6  # between cells
_PAGE = (225, 225, 225)  # neither black nor white, as masks are
_SMALLEST = 128  # side of a cell, so that labels fit
_MARGIN = 6  # beyond the border, for blending


def read_picture(path: str) -> Image.Image:
    """Returns a picture file as RGB, upright, its transparency on white; UserError if it cannot."""
    return _upright(_decode(path, _read(path, "picture")))


def read_area(path: str, picture: Image.Image) -> Bool[np.ndarray, "H W"]:
    """Returns where a mask file is white; of a partly transparent one, where it is painted.

    Raises UserError if it cannot be read, or has another size than the picture.
    """
    data = _read(path, "mask")
    mask = _decode(path, data).convert("L")
    with Image.open(io.BytesIO(data)) as image:
        if "A" in image.getbands() or "a" in image.getbands() or "transparency" in image.info:
            alpha = image.convert("RGBA").getchannel("A")
            mask = alpha if np.asarray(alpha).min() < 255 else mask
    mask = _upright(mask)
    if mask.size != picture.size:
        raise UserError(
            f"the mask {path} is {mask.width}x{mask.height} and the picture is "
            f"{picture.width}x{picture.height}: make the mask on the picture, in its size"
        )
    return np.asarray(mask) >= 128


def box_area(text: str, picture: Image.Image) -> Bool[np.ndarray, "H W"]:
    """Returns the inside of 'x0,y0,x1,y1' in the picture's pixels, x1 and y1 left out.

    Raises UserError unless the box is inside the picture and not empty.
    """
    try:
        x0, y0, x1, y1 = (int(part) for part in text.split(","))
    except ValueError:
        raise UserError(
            f"cannot read the box {text!r}: write x0,y0,x1,y1 in pixels of the picture"
        ) from None
    if not (0 <= x0 < x1 <= picture.width and 0 <= y0 < y1 <= picture.height):
        raise UserError(
            f"the box {text} is empty or outside of the picture: "
            f"x goes from 0 to {picture.width}, y from 0 to {picture.height}"
        )
    area = np.zeros((picture.height, picture.width), bool)
    area[y0:y1, x0:x1] = True
    return area


def crop_area(area: Bool[np.ndarray, "H W"], size: int) -> Bool[np.ndarray, "S S"]:
    """Returns an area under ADM's centre crop to `size` x `size`, as the picture is cropped."""
    mask = Image.fromarray(area.astype(np.uint8) * 255).convert("RGB")
    return center_crop(mask, size)[..., 0] >= 128


def reduced_view(picture: Image.Image, size: int, rate: int) -> UInt8[np.ndarray, "S S 3"]:
    """Returns the centre crop reduced to `size // rate`, enlarged again bilinearly."""
    small = Image.fromarray(center_crop(picture, max(size // rate, 1)))
    return np.asarray(small.resize((size, size), Image.Resampling.BILINEAR))


def crop_square(picture: Image.Image, size: int) -> tuple[int, int, int]:
    """Returns left, top and side, in the picture's pixels, of what ADM's centre crop shows."""
    reduced, side = resize_shorter(picture, size), min(picture.size)
    places = [
        min(round((small - size) // 2 * whole / small), whole - side)
        for small, whole in zip(reduced.size, picture.size, strict=True)
    ]
    return places[0], places[1], side


def paste_crop(
    picture: Image.Image, square: tuple[int, int, int], view: UInt8[np.ndarray, "S S 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the picture with a view in place of its square (left, top, side)."""
    left, top, side = square
    whole = picture.copy()
    scaled = Image.fromarray(view).resize((side, side), Image.Resampling.BICUBIC)
    whole.paste(scaled, (left, top))
    return np.asarray(whole)


def require_opencv():
    """Returns the module cv2; raises UserError that says how to get it."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            "blending needs OpenCV: pip install 'bitgen[edit]', or set config.edit.blend=False"
        ) from None
    return cv2


def blend(
    base: UInt8[np.ndarray, "H W 3"],
    patch: UInt8[np.ndarray, "H W 3"],
    area: Bool[np.ndarray, "H W"],
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns `base` with the detail of `patch` in the area, colours meeting at its edge.

    Poisson blending (Pérez et al. 2003) by OpenCV's `seamlessClone`. Areas less than 3 pixels wide
    or high have no inside, and change nothing.
    """
    cv2 = require_opencv()
    # OpenCV holds the edge of the area at `base`, and ignores an area at the picture's border.
    # Where the area reaches the border the patch goes on beyond it, so that it is free there.
    mask = np.pad(np.pad(area, _MARGIN - 1, mode="edge"), 1).astype(np.uint8) * 255
    rows, columns = np.nonzero(mask)
    if not len(rows) or min(np.ptp(rows), np.ptp(columns)) < 2:
        return base
    widths = ((_MARGIN, _MARGIN), (_MARGIN, _MARGIN), (0, 0))
    beyond = np.pad(np.zeros(area.shape, bool), _MARGIN, constant_values=True)
    free = beyond & np.pad(area, _MARGIN, mode="edge")
    patch = np.pad(patch, widths, mode="edge")
    whole = np.where(free[..., None], patch, np.pad(base, widths, mode="edge"))
    # The centre of the area's bounding box: where OpenCV puts that box, so that nothing moves.
    centre = [int(at.min() + (np.ptp(at) + 1) // 2) for at in (columns, rows)]
    blended = cv2.seamlessClone(patch, whole, mask, tuple(centre), cv2.NORMAL_CLONE)
    return blended[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN]


def sheet(rows: list[list[tuple[str, UInt8[np.ndarray, "S S 3"]]]]) -> UInt8[np.ndarray, "H W 3"]:
    """Returns rows of square pictures of one size, each below its label."""
    size = rows[0][0][1].shape[0]
    scale = -(-_SMALLEST // size)
    side = size * scale
    width, height = side + _GAP, side + _LABEL + _GAP
    columns = max(map(len, rows))
    page = Image.new("RGB", (columns * width + _GAP, len(rows) * height + _GAP), _PAGE)
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(size=13)
    for i, row in enumerate(rows):
        for j, (label, picture) in enumerate(row):
            left, top = j * width + _GAP, i * height + _GAP
            pen.text((left + 1, top), label, fill="black", font=font)
            cell = Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)
            page.paste(cell, (left, top + _LABEL))
    return np.asarray(page)


def _read(path: str, what: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read the {what} {path}: {error.strerror or error}") from None


def _decode(path: str, data: bytes) -> Image.Image:
    try:
        return decode(data)
    except BrokenImage as error:
        raise UserError(f"cannot read {path} as a picture: {error}") from None


def _upright(image: Image.Image) -> Image.Image:
    """Turned as the camera says in the file."""
    return ImageOps.exif_transpose(image)
