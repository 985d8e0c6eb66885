"""The user's picture around an edit: its centre crop, pasting into it, blending.

Pixels are uint8 `[H, W, 3]`, areas bool `[H, W]`.
"""

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from bitgen.errors import UserError
from bitgen.images.decode import center_crop, resize_shorter

_MARGIN = 6  # beyond the border, for blending


def crop_area(area: Bool[np.ndarray, "H W"], size: int) -> Bool[np.ndarray, "S S"]:
    """Returns an area cropped to `size` x `size` as its picture is, by ADM's centre crop."""
    mask = Image.fromarray(area.astype(np.uint8) * 255).convert("RGB")
    return center_crop(mask, size)[..., 0] >= 128


def reduced_view(picture: Image.Image, size: int, rate: int) -> UInt8[np.ndarray, "S S 3"]:
    """Returns the centre crop reduced to `size // rate`, enlarged again bilinearly."""
    small = Image.fromarray(center_crop(picture, max(size // rate, 1)))
    return np.asarray(small.resize((size, size), Image.Resampling.BILINEAR))


def crop_square(picture: Image.Image, size: int) -> tuple[int, int, int]:
    """Returns left, top and side of ADM's centre crop, in pixels of the picture."""
    reduced, side = resize_shorter(picture, size), min(picture.size)
    places = [
        min(round((small - size) // 2 * whole / small), whole - side)
        for small, whole in zip(reduced.size, picture.size, strict=True)
    ]
    return places[0], places[1], side


def paste_crop(
    picture: Image.Image, square: tuple[int, int, int], view: UInt8[np.ndarray, "S S 3"]
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns the picture with its square (left, top, side) replaced by a view."""
    left, top, side = square
    whole = picture.copy()
    scaled = Image.fromarray(view).resize((side, side), Image.Resampling.BICUBIC)
    whole.paste(scaled, (left, top))
    return np.asarray(whole)


def require_opencv():
    """Returns the module cv2; raises UserError that says how to install it."""
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
    """Returns `base` with the detail of `patch` in the area, with matching colours at its edge.

    Poisson blending (Pérez et al. 2003) by OpenCV's `seamlessClone`. Areas less than 3 pixels wide
    or high have no interior and change nothing.
    """
    cv2 = require_opencv()
    # OpenCV fixes the edge of the area to `base`, and ignores an area at the picture's border.
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
