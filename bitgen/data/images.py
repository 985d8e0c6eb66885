"""Pixels: decoding, crops, and image files. uint8 `[H, W, 3]` (HWC, RGB) throughout."""

import io
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw

from bitgen.errors import UserError


class BrokenImage(Exception):
    """Data that cannot be decoded as an image; the message is the reason."""


def decode(data: bytes | np.ndarray) -> Image.Image:
    """Encoded bytes, or uint8 `[H, W]` or `[H, W, 1|3|4]` -> an RGB image of the same size.

    Greyscale, palette, 16-bit and CMYK become RGB; transparency is laid on white.
    Raises BrokenImage.
    """
    try:
        if isinstance(data, np.ndarray):
            image = Image.fromarray(data[..., 0] if data.shape[2:] == (1,) else data)
        else:
            image = Image.open(io.BytesIO(data))
        image.load()
        return to_rgb(image)
    except MemoryError:
        raise
    # Decoders of damaged bytes raise much more than OSError: SyntaxError, struct.error, ...
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        # PIL prints the address of the buffer, which says nothing.
        reason = "not an image" if reason.startswith("cannot identify") else reason
        raise BrokenImage("empty file" if len(data) == 0 else reason) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Greyscale, palette, 16-bit and CMYK as RGB, transparency laid on white."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16 bits: PIL would clip at 255 instead of scaling
        wide = np.clip(np.asarray(image).astype(np.int64), 0, 65535)
        return Image.fromarray(np.round(wide / 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def resize_shorter(image: Image.Image, size: int) -> Image.Image:
    """Shorter side to `size` as in ADM: halved with BOX while twice too large, then BICUBIC.

    https://github.com/openai/guided-diffusion `guided_diffusion/image_datasets.py`.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _cut(image: Image.Image, left: int, top: int, size: int) -> UInt8[np.ndarray, "H W 3"]:
    return np.array(image.crop((left, top, left + size, top + size)))


def center_crop(image: Image.Image, size: int) -> UInt8[np.ndarray, "H W 3"]:
    """ADM's centre crop to `size` x `size`."""
    image = resize_shorter(image, size)
    return _cut(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop(
    image: Image.Image,
    size: int,
    rng: np.random.Generator,
    scale_min: float = 0.8,
    scale_max: float = 1.0,
) -> UInt8[np.ndarray, "H W 3"]:
    """ADM's random crop: a square of `scale_min` to `scale_max` of the shorter side."""
    low, high = int(np.ceil(size / scale_max)), int(np.ceil(size / scale_min))
    image = resize_shorter(image, int(rng.integers(low, high + 1)))
    return _random_cut(image, size, rng)


def resize_crop(
    image: Image.Image, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    """Binary Latent Diffusion's crop: shorter side to 1.05 x `size`, BILINEAR, random square."""
    shorter = int(1.05 * size)
    # The longer side rounded down, as torchvision does.
    width, height = (shorter * side // min(image.size) for side in image.size)
    return _random_cut(image.resize((width, height), Image.Resampling.BILINEAR), size, rng)


def _random_cut(
    image: Image.Image, size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "H W 3"]:
    left = int(rng.integers(image.width - size + 1))
    top = int(rng.integers(image.height - size + 1))
    return _cut(image, left, top, size)


# name -> (image, size, rng, scale_min, scale_max) -> uint8 [size, size, 3]
CROPS: dict[str, Callable[..., np.ndarray]] = {
    "center": lambda image, size, rng, low, high: center_crop(image, size),
    "random": lambda image, size, rng, low, high: random_crop(image, size, rng, low, high),
    "resize": lambda image, size, rng, low, high: resize_crop(image, size, rng),
}


def flip(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "H W 3"]:
    """Mirrors left and right."""
    return np.ascontiguousarray(image[:, ::-1])


def grid(images: UInt8[np.ndarray, "n H W 3"], columns: int) -> UInt8[np.ndarray, "gH gW 3"]:
    """Images in rows of `columns`, in order; places left over are black."""
    images = np.asarray(images)
    if columns < 1 or images.ndim != 4:
        raise UserError(
            f"a grid takes images [n, H, W, 3] and columns >= 1, got {list(images.shape)} "
            f"and {columns}"
        )
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    cells = np.zeros((rows * columns, height, width, channels), images.dtype)
    cells[:n] = images
    cells = cells.reshape(rows, columns, height, width, channels)
    return cells.swapaxes(1, 2).reshape(rows * height, columns * width, channels)


def paired_grid(
    above: UInt8[np.ndarray, "n H W 3"], below: UInt8[np.ndarray, "n H W 3"], columns: int
) -> UInt8[np.ndarray, "gH gW 3"]:
    """Rows of `columns` images, each above the row of what belongs to them; full rows only."""
    columns = min(columns, len(above))
    starts = range(0, len(above) // columns * columns, columns)
    rows = [part[start : start + columns] for start in starts for part in (above, below)]
    return grid(np.concatenate(rows), columns)


def bars(values: dict[str, np.ndarray], height: int = 64) -> UInt8[np.ndarray, "H W 3"]:
    """Draws a row of bars for each name: values [k] in [0, 1], left to right, the name above."""
    count = max(len(row) for row in values.values())
    width = max(2, min(16, 960 // count))
    margin = 14
    picture = Image.new("RGB", (max(count * width, 120), len(values) * (height + margin)), "white")
    draw = ImageDraw.Draw(picture)
    for i, (name, row) in enumerate(values.items()):
        top = i * (height + margin) + margin
        draw.text((1, top - margin), name, fill="black")
        draw.rectangle((0, top, picture.width, top + height - 1), fill=(225, 225, 225))
        for j, value in enumerate(np.clip(row, 0, 1)):
            if length := round(float(value) * height):
                box = (j * width, top + height - length, (j + 1) * width - 2, top + height - 1)
                draw.rectangle(box, fill=(40, 90, 160))
    return np.asarray(picture)


def write_png(path: str | os.PathLike, image: UInt8[np.ndarray, "H W c"]) -> None:
    """Writes uint8 `[H, W, 3]` (or 4, or `[H, W]`) as PNG: whole or not at all.

    Missing folders are made. Raises UserError for another dtype or shape.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or (image.ndim, *image.shape[2:]) not in ((2,), (3, 3), (3, 4)):
        raise UserError(
            f"{path}: a PNG takes uint8 [H, W, 3], got {image.dtype} {list(image.shape)}"
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        Image.fromarray(image).save(part, format="PNG")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
