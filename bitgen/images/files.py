"""Image files: decoding to RGB, and writing PNG. Pixels are uint8 `[H, W, 3]`."""

import io
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

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
