"""Crops of ADM and of Binary Latent Diffusion. Pixels are uint8 `[H, W, 3]`."""

from collections.abc import Callable

import numpy as np
from jaxtyping import UInt8
from PIL import Image


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
