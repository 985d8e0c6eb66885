"""DiffAugment is that of the paper's code."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from helpers.arrays import close, images_like, nchw, nhwc

from bitgen.losses import augment
from bitgen.losses.augment import diff_augment


def torch_augment(x: torch.Tensor, factors: augment.AugmentFactors) -> torch.Tensor:
    """The paper's rule on NCHW, with given factors."""
    brightness, saturation, contrast = (
        torch.tensor(np.asarray(f)).view(-1, 1, 1, 1) for f in factors[:3]
    )
    x = x + brightness
    grey = x.mean(dim=1, keepdim=True)
    x = (x - grey) * saturation + grey
    mean = x.mean(dim=[1, 2, 3], keepdim=True)
    x = (x - mean) * contrast + mean
    _, _, height, width = x.shape
    out = torch.zeros_like(x)
    for n, (down, right) in enumerate(np.asarray(factors.shift)):
        for i in range(height):
            for j in range(width):
                if 0 <= i + down < height and 0 <= j + right < width:
                    out[n, :, i, j] = x[n, :, i + down, j + right]
    return out


def test_diff_augment_is_torchs_with_the_same_numbers():
    images, key = images_like((5, 12, 20, 3)), jax.random.key(3)
    factors = augment.draw_factors(jax.random.clone(key), 5, 12, 20)
    assert len({tuple(shift) for shift in np.asarray(factors.shift).tolist()}) > 1
    pixels = nchw(images).requires_grad_()
    expected = torch_augment(pixels, factors)
    expected.square().sum().backward()
    result = jax.jit(diff_augment)(images, jax.random.clone(key))
    close(result, nhwc(expected.detach()), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda x: jnp.sum(jnp.square(diff_augment(x, key))))(images)
    close(gradient, nhwc(pixels.grad), rtol=1e-4, atol=1e-4)


def test_translation_by_hand():
    image = jnp.arange(1.0, 65.0).reshape(1, 8, 8, 1)
    up = augment.translate(image, jnp.array([[1, -1]]))[0, :, :, 0]
    np.testing.assert_array_equal(up[-1], 0)  # the last row has come up, zeros below
    np.testing.assert_array_equal(up[:, 0], 0)
    np.testing.assert_array_equal(up[:-1, 1:], image[0, 1:, :-1, 0])


def test_augment_ranges():
    assert augment.shift_limits(256, 20) == (32, 3)
    assert augment.shift_limits(12, 11) == (2, 1)
    factors = augment.draw_factors(jax.random.key(0), 4096, 256, 20)
    for values, low, high in zip(factors[:3], (-0.5, 0, 0.5), (0.5, 2, 1.5), strict=True):
        assert low <= values.min() < low + 0.01 * (high - low)
        assert high - 0.01 * (high - low) < values.max() < high
    np.testing.assert_array_equal(factors.shift.min(axis=0), [-32, -3])
    np.testing.assert_array_equal(factors.shift.max(axis=0), [32, 3])
    # Policies apply alone, too.
    images = images_like((2, 16, 16, 3))
    moved = diff_augment(images, jax.random.key(1), ["translation"])
    shift = augment.draw_factors(jax.random.key(1), 2, 16, 16).shift
    np.testing.assert_array_equal(moved, augment.translate(images, shift))
    np.testing.assert_array_equal(diff_augment(images, jax.random.key(1), []), images)
