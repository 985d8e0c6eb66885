"""Pictures and masks that a user gives: files, PIL images and arrays; and images given back."""

import io
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageOps

from bitgen.errors import UserError, choose
from bitgen.images.decode import BrokenImage, center_crop, decode, to_rgb
from bitgen.images.pixels import from_uint8, to_uint8


def read_picture(path: str) -> Image.Image:
    """Returns a picture file as upright RGB with transparency on white; UserError if unreadable."""
    return _upright(_decode(path, _read(path, "picture")))


def read_area(path: str, picture: Image.Image) -> Bool[np.ndarray, "H W"]:
    """Returns where a mask file is white or, in a partly transparent file, where it is painted.

    Raises UserError if it cannot be read, or its size differs from the picture's.
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
    """Returns the inside of 'x0,y0,x1,y1' in pixels of the picture; x1 and y1 are exclusive.

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
    """Returns the picture rotated as its EXIF data says."""
    return ImageOps.exif_transpose(image)


def as_picture(image: Any) -> Image.Image:
    """Returns one picture as RGB: PIL, a file, uint8 [H, W, 3] or float [H, W, 3] in [-1, 1]."""
    (one,) = several(image)[:1] or (None,)
    if isinstance(one, str | Path):
        return read_picture(str(one))
    if isinstance(one, Image.Image):
        return to_rgb(ImageOps.exif_transpose(one))
    array = np.asarray(one)
    if array.ndim != 3 or array.shape[-1] != 3 or array.dtype.kind not in "uf":
        raise UserError(f"a picture is uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
    if array.dtype.kind == "f":
        _check_range(array)
        array = np.asarray(to_uint8(jnp.asarray(array, jnp.float32)))
    if array.dtype != np.uint8:
        raise UserError(f"a picture is uint8 or float, got {array.dtype}")
    return Image.fromarray(array)


def read_image(image: Any, size: int) -> np.ndarray:
    """Returns one picture at the model's `size`: uint8, or float32 if it was given as float.

    Raises UserError for a float image of another size or range, and for anything that is no
    picture.
    """
    if isinstance(image, np.ndarray) and image.dtype.kind == "f":
        if image.shape != (size, size, 3):
            raise UserError(
                f"float images must have the model's size [{size}, {size}, 3], got "
                f"{list(image.shape)}; uint8 ones are cropped to it"
            )
        _check_range(image)
        return image.astype(np.float32)
    return center_crop(as_picture(image), size)


def read_mask(mask: Any, picture: Image.Image, grid: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """Returns a mask in the size of the picture or of the grid of tokens, whichever it has.

    Masks are files or PIL images (white: marked), or bool or uint8 [H, W]. Raises UserError for
    another size, and if nothing, or all of the grid, is marked.
    """
    if isinstance(mask, str | Path):
        area = read_area(str(mask), picture)
    else:
        area = np.asarray(mask.convert("L") if isinstance(mask, Image.Image) else mask)
    if area.ndim != 2 or area.dtype not in (bool, np.uint8):
        raise UserError(f"a mask is bool [H, W], got {area.dtype} {list(area.shape)}")
    area = area if area.dtype == bool else area >= 128
    if not area.any():
        raise UserError("the mask marks nothing")
    if area.shape == (picture.height, picture.width):
        return area
    if area.shape != tuple(grid):
        raise UserError(
            f"the mask is {area.shape[1]}x{area.shape[0]}: make it in the size of the picture, "
            f"{picture.width}x{picture.height}, or of the grid, {grid[1]}x{grid[0]}"
        )
    if area.all():
        raise UserError("the mask marks every token: leave some out")
    return area


def _check_range(image: np.ndarray) -> None:
    if not np.isfinite(image).all() or np.abs(image).max(initial=0) > 1.5:
        raise UserError("float images are in [-1, 1]; give uint8 for 0 to 255")


def several(images: Any) -> list[Any]:
    """Returns a list of the pictures in a list, an array [b, H, W, 3], or a single picture."""
    if isinstance(images, list | tuple):
        return [one for part in images for one in several(part)]
    if isinstance(images, str | Path | Image.Image):
        return [images]
    array = np.asarray(images)
    return list(array) if array.ndim == 4 else [array]


def give(images: np.ndarray, to: str) -> Any:
    """Returns images [b, H, W, 3], uint8 or float, as uint8, float32 or a list of PIL images."""
    choose("format", to, ("uint8", "float", "pil"))
    if to == "float":
        images = images if images.dtype != np.uint8 else np.asarray(from_uint8(jnp.asarray(images)))
        return images.astype(np.float32)
    pixels = images if images.dtype == np.uint8 else np.asarray(to_uint8(jnp.asarray(images)))
    return pixels if to == "uint8" else [Image.fromarray(image) for image in pixels]
