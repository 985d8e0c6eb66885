"""Decoding and crops are those of ADM and Binary Latent Diffusion."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from bitgen.images import decode
from bitgen.images.pixels import from_uint8, to_uint8

# Kernels and supports of the three filters, as functions of the distance.
BOX = (lambda x: ((x > -0.5) & (x <= 0.5)) * 1.0, 0.5)
BILINEAR = (lambda x: np.maximum(1 - abs(x), 0), 1.0)
BICUBIC = (
    lambda x: np.where(
        abs(x) < 1,
        1.5 * abs(x) ** 3 - 2.5 * x**2 + 1,
        np.where(abs(x) < 2, -0.5 * abs(x) ** 3 + 2.5 * x**2 - 4 * abs(x) + 2, 0),
    ),
    2.0,
)


def resample_rows(array: np.ndarray, size: int, filter_) -> np.ndarray:
    """Resamples the first axis in 22-bit fixed point, as 8-bit image libraries do."""
    if len(array) == size:
        return array
    kernel, support = filter_
    scale = len(array) / size
    stretch = max(scale, 1.0)
    rows = []
    for i in range(size):
        center = (i + 0.5) * scale
        first = max(int(center - support * stretch + 0.5), 0)
        last = min(int(center + support * stretch + 0.5), len(array))
        weights = kernel((np.arange(first, last) - center + 0.5) / stretch)
        weights = np.round(weights / weights.sum() * 2**22).astype(np.int64)
        total = np.tensordot(weights, array[first:last].astype(np.int64), 1)
        rows.append(np.clip((total + 2**21) >> 22, 0, 255))
    return np.stack(rows).astype(np.uint8)


def resample(array: np.ndarray, height: int, width: int, filter_) -> np.ndarray:
    """Columns first, then rows, rounded to 8 bits in between."""
    across = resample_rows(array.swapaxes(0, 1), width, filter_).swapaxes(0, 1)
    return resample_rows(across, height, filter_)


def adm_resize(array: np.ndarray, size: int) -> np.ndarray:
    while min(array.shape[:2]) >= 2 * size:
        array = resample(array, array.shape[0] // 2, array.shape[1] // 2, BOX)
    scale = size / min(array.shape[:2])
    return resample(array, round(array.shape[0] * scale), round(array.shape[1] * scale), BICUBIC)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def contains(large: np.ndarray, small: np.ndarray) -> bool:
    windows = np.lib.stride_tricks.sliding_window_view(large, small.shape)
    return bool((windows == small).all(axis=(-3, -2, -1)).any())


def encode(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("height", "width", "size"),
    # Mostly wide: for tall images newer versions of Pillow take the rows first.
    [(32, 32, 32), (48, 64, 24), (37, 53, 32), (130, 97, 24), (71, 200, 16), (9, 13, 32)],
)
def test_center_crop_is_adms_pixel_for_pixel(height, width, size):
    array = noise(height, width)
    whole = adm_resize(array, size)
    top, left = (whole.shape[0] - size) // 2, (whole.shape[1] - size) // 2
    expected = whole[top : top + size, left : left + size]
    np.testing.assert_array_equal(decode.center_crop(decode.decode(array), size), expected)


def test_random_crop_is_a_window_of_adms_resize_at_a_scale_in_range():
    array = noise(50, 70)
    sides = {side: adm_resize(array, side) for side in range(20, 26)}  # 20 / 1.0 to 20 / 0.8
    rng = np.random.default_rng(1)
    used = set()
    for _ in range(40):
        crop = decode.random_crop(decode.decode(array), 20, rng, 0.8, 1.0)
        assert crop.shape == (20, 20, 3)
        matches = [side for side, whole in sides.items() if contains(whole, crop)]
        assert matches
        used.update(matches)
    assert {20, 25} <= used  # both ends are drawn


def test_resize_crop_is_a_window_of_the_bilinear_resize():
    array = noise(61, 90)
    whole = resample(array, 42, 42 * 90 // 61, BILINEAR)  # int(1.05 * 40) = 42
    rng = np.random.default_rng(2)
    made = [decode.resize_crop(decode.decode(array), 40, rng) for _ in range(8)]
    assert all(crop.shape == (40, 40, 3) and contains(whole, crop) for crop in made)
    assert len({crop.tobytes() for crop in made}) > 1


def palette_image(transparent: bool) -> bytes:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    return encode(image, transparency=1) if transparent else encode(image)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (encode(Image.new("L", (2, 1), 77)), (77, 77, 77)),
        (encode(Image.new("1", (2, 1), 1)), (255, 255, 255)),
        (encode(Image.new("RGB", (2, 1), (1, 2, 3))), (1, 2, 3)),
        (encode(Image.new("RGBA", (2, 1), (0, 0, 0, 0))), (255, 255, 255)),
        (encode(Image.new("RGBA", (2, 1), (0, 50, 100, 255))), (0, 50, 100)),
        (encode(Image.new("LA", (2, 1), (0, 51))), (204, 204, 204)),
        (encode(Image.fromarray(np.full((1, 2), 40000, np.uint16))), (156, 156, 156)),
        (encode(Image.new("CMYK", (2, 1), (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
        (palette_image(transparent=False), (10, 20, 30)),
        (palette_image(transparent=True), (10, 20, 30)),
        (np.full((1, 2), 9, np.uint8), (9, 9, 9)),
        (np.full((1, 2, 1), 9, np.uint8), (9, 9, 9)),
    ],
)
def test_every_kind_of_image_becomes_rgb(data, expected):
    array = np.asarray(decode.decode(data))
    assert (array.shape, array.dtype) == ((1, 2, 3), np.uint8)
    assert tuple(array[0, 0]) == expected


def test_transparency_of_a_palette_is_laid_on_white():
    image = np.asarray(decode.decode(palette_image(transparent=True)))
    assert tuple(image[0, 1]) == (255, 255, 255)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"this is a text", "not an image"),
        (encode(Image.fromarray(noise(64, 64)), "JPEG")[:900], "truncated"),
        (encode(Image.fromarray(noise(64, 64)))[:900], "truncated"),
        (encode(Image.fromarray(noise(64, 64)), "WEBP")[:900], "."),
    ],
)
def test_broken_data_says_why(data, reason):
    with pytest.raises(decode.BrokenImage, match=reason):
        decode.decode(data)


def test_flip_mirrors_left_and_right():
    array = noise(3, 4)
    np.testing.assert_array_equal(decode.flip(array)[:, 0], array[:, 3])
    np.testing.assert_array_equal(decode.flip(decode.flip(array)), array)


def test_to_uint8_rounds_and_clips():
    values = np.array([-7.0, -1.0, 0.0, 1.0, 3.0, -1 + 2 * 77.4 / 255, -1 + 2 * 77.6 / 255])
    out = to_uint8(jnp.asarray(values.reshape(1, 1, 7, 1)))
    assert out.dtype == np.uint8
    assert out.ravel().tolist() == [0, 0, 128, 255, 255, 77, 78]
    every = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(from_uint8(jnp.asarray(every))), every)
