"""Resizes are those of TensorFlow 1 and PyTorch."""

import numpy as np
import pytest

from bitgen.evaluation.features import prepare_adm, prepare_pytorch_fid
from bitgen.evaluation.resize import bilinear_weights, resize_bilinear


@pytest.mark.parametrize("size", [8, 32, 256, 400])
def test_resizes_are_those_of_tensorflow_1_and_pytorch(size):
    import tensorflow as tf
    import torch

    images = np.random.default_rng(size).integers(0, 256, (2, size, size + 3, 3), np.uint8)
    pixels = images.astype(np.float32)
    theirs = tf.compat.v1.image.resize_bilinear(
        pixels, (299, 299), align_corners=False, half_pixel_centers=False
    ).numpy()
    ours = np.asarray(resize_bilinear(pixels, 299, legacy=True))
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4)
    np.testing.assert_allclose(prepare_adm(images), (theirs - 128) / 128, rtol=0, atol=1e-6)
    theirs = torch.nn.functional.interpolate(
        torch.tensor(pixels.transpose(0, 3, 1, 2) / 255),
        size=(299, 299),
        mode="bilinear",
        align_corners=False,
    )
    theirs = 2 * theirs.numpy().transpose(0, 2, 3, 1) - 1
    np.testing.assert_allclose(prepare_pytorch_fid(images), theirs, rtol=0, atol=1e-5)
    assert np.abs(np.asarray(prepare_adm(images)) - theirs).max() > 0.01  # they are not the same


def test_rows_of_a_resize_sum_to_one():
    for legacy in (True, False):
        weights = bilinear_weights(7, 299, legacy=legacy)
        np.testing.assert_allclose(weights.sum(1), 1, rtol=1e-6)
        assert (weights >= 0).all()
