"""Convolutions that are written out: what `nn.Conv` gives with the same parameters."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bitgen.nn import winograd
from bitgen.nn.conv import Depthwise, Grouped, conv, unrolled

X = jax.random.normal(jax.random.key(0), (2, 5, 4, 12))


def same(ours, theirs, x=X):
    variables = theirs.init(jax.random.key(1), x)
    mine = ours.init(jax.random.key(2), x)
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, variables)

    def loss(module):
        return lambda variables, x: jnp.sum(jnp.sin(module.apply(variables, x)))

    np.testing.assert_allclose(ours.apply(variables, x), theirs.apply(variables, x), atol=1e-5)
    for a, b in zip(
        jax.tree.leaves(jax.grad(loss(ours), (0, 1))(variables, x)),
        jax.tree.leaves(jax.grad(loss(theirs), (0, 1))(variables, x)),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(("side", "bias"), [(3, True), (5, False)])
def test_depthwise(side, bias):
    init = nn.initializers.normal()
    theirs = nn.Conv(12, (side, side), feature_group_count=12, use_bias=bias, bias_init=init)
    same(Depthwise(side, bias), theirs)


def test_grouped():
    same(Grouped(3), nn.Conv(12, (1, 1), feature_group_count=3, use_bias=False))


@pytest.mark.parametrize(("h", "w"), [(1, 1), (2, 2), (2, 5), (4, 4)])
@pytest.mark.parametrize(("strides", "padding"), [(1, 1), (2, 1), (2, ((0, 1), (0, 1)))])
def test_images_smaller_than_the_kernel(h, w, strides, padding):
    theirs = nn.Conv(6, (3, 3), strides=strides, padding=padding)
    ours = conv(6, 3, None, jnp.float32, strides=strides, padding=padding)
    same(ours, theirs, jax.random.normal(jax.random.key(3), (2, h, w, 5)))


@pytest.mark.parametrize("whole", [True, False])
def test_winograd(whole, monkeypatch):
    monkeypatch.setattr(winograd, "_FEATURES", 5)
    monkeypatch.setattr(winograd, "_PIXELS", 16 * 6)
    monkeypatch.setattr(winograd, "_WHOLE", 10**6 if whole else 0)
    used = mock.Mock(side_effect=winograd.by_tiles)
    monkeypatch.setattr(winograd, "by_tiles", used)
    x = jax.random.normal(jax.random.key(3), (2, 16, 6, 5))
    same(conv(6, 3, None, jnp.float32), nn.Conv(6, (3, 3), padding=1), x)
    assert used.called
    used.reset_mock()
    # Another stride, padding, kernel or type, odd sides, too few pixels: a plain convolution.
    for layer, image in (
        (conv(6, 3, None, jnp.float32, strides=2), x),
        (conv(6, 3, None, jnp.float32, padding=((0, 1), (0, 1))), x),
        (conv(6, 5, None, jnp.float32), x),
        (conv(6, 3, None, jnp.bfloat16), x),
        (conv(6, 3, None, jnp.float32), jnp.ones((2, 16, 7, 5))),
        (conv(6, 3, None, jnp.float32), jnp.ones((2, 17, 6, 5))),
        (conv(6, 3, None, jnp.float32), x[:, :8]),
    ):
        layer.init(jax.random.key(1), image)
    assert not used.called


@pytest.mark.parametrize("length", [1, 3])
def test_no_loop_over_convolutions_is_left_on_cpu(length):
    def layers(x):
        unroll = unrolled(length)
        last, _ = jax.lax.scan(lambda x, _: (x + 1, None), x, length=length, unroll=unroll)
        return last

    assert "while" not in jax.jit(layers).lower(1.0).as_text()
