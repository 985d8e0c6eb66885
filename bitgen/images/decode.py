"""From encoded bytes to square pixels: decoding to RGB, crops, mirroring.

Pixels are uint8 `[H, W, 3]`. Crops are those of ADM and of Binary Latent Diffusion.
"""

import io
from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image


class BrokenImage(Exception):
    """Data that cannot be decoded as an image; the message is the reason."""


def decode(data: bytes | np.ndarray) -> Image.Image:
    """Returns an RGB image of encoded bytes, or of uint8 `[H, W]` or `[H, W, 1|3|4]`.

    Greyscale, palette, 16-bit and CMYK become RGB, and transparency becomes white. Raises
    BrokenImage.
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
        # PIL prints the address of the buffer.
        reason = "not an image" if reason.startswith("cannot identify") else reason
        raise BrokenImage("empty file" if len(data) == 0 else reason) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Returns greyscale, palette, 16-bit and CMYK images as RGB, with transparency on white."""
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
    """Resizes the shorter side to `size` as ADM does: halving with BOX, then BICUBIC.

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
