"""Convolutions that are written out: what `nn.Conv` gives with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from bitgen.nn.conv import Depthwise, Grouped

X = jax.random.normal(jax.random.key(0), (2, 5, 4, 12))


def same(ours, theirs):
    variables = theirs.init(jax.random.key(1), X)
    mine = ours.init(jax.random.key(2), X)
    assert jax.tree.map(jnp.shape, mine) == jax.tree.map(jnp.shape, variables)

    def loss(module):
        return lambda variables, x: jnp.sum(jnp.sin(module.apply(variables, x)))

    np.testing.assert_allclose(ours.apply(variables, X), theirs.apply(variables, X), atol=1e-5)
    for a, b in zip(
        jax.tree.leaves(jax.grad(loss(ours), (0, 1))(variables, X)),
        jax.tree.leaves(jax.grad(loss(theirs), (0, 1))(variables, X)),
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
