"""Grids, captions and planes of bits."""

import numpy as np
import pytest

from bitgen.errors import UserError
from bitgen.images import grids


def test_grid_is_row_by_row_and_filled_with_black():
    array = np.stack([np.full((2, 3, 3), 10 * (i + 1), np.uint8) for i in range(5)])
    out = grids.grid(array, 3)
    assert out.shape == (4, 9, 3)
    assert out[0, ::3, 0].tolist() == [10, 20, 30]
    assert out[2, ::3, 0].tolist() == [40, 50, 0]
    with pytest.raises(UserError, match="columns >= 1"):
        grids.grid(array, 0)


RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (5, 8, 8, 3), np.uint8)


def test_captions_stand_above_their_images_and_are_cut():
    short = grids.captioned_grid(IMAGES, ["a", "b", "c", "d", "e"], 3)
    wide = grids.captioned_grid(IMAGES, ["tench, Tinca tinca, and its kin"] * 5, 3)
    assert short.shape == wide.shape
    enlarged = IMAGES[4].repeat(16, 0).repeat(16, 1)  # to 128 pixels
    below = short[-134:-6]
    assert any((below[:, x : x + 128] == enlarged).all() for x in range(short.shape[1] - 128))
    with pytest.raises(UserError, match="5 images, 1 captions"):
        grids.captioned_grid(IMAGES, ["a"], 3)


def test_planes_show_where_a_bit_is_set():
    bits = np.zeros((4, 4, 10), bool)
    bits[1, 2, 9] = True
    page = grids.bit_planes(bits, IMAGES[0])
    white = (page == 255).all(-1)
    assert white.sum() == 32 * 32  # one token of one plane, of 128 pixels
    rows, columns = np.nonzero(white)
    assert np.ptp(rows) == np.ptp(columns) == 31
    assert rows.min() > page.shape[0] / 2  # in the second row of planes
    with pytest.raises(UserError, match="bool"):
        grids.bit_planes(np.zeros((4, 4, 10)))
