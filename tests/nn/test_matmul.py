"""Kernels stored features first: the same products, read from where they are stored."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers import small
from test_remat import MODULES

from bitgen.nn import matmul
from bitgen.nn.matmul import FEATURES_FIRST, DotGeneral, cast_kernels

LAYERS = {
    "dense": (nn.Dense(5, dot_general_cls=DotGeneral), (3, 4)),
    "many features": (nn.DenseGeneral((2, 3, 5), dot_general_cls=DotGeneral), (2, 3, 4)),
    "many inputs": (nn.DenseGeneral(5, axis=(-2, -1), dot_general_cls=DotGeneral), (2, 3, 4, 6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_stored_kernel_gives_the_same_product(name):
    layer, shape = LAYERS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    params = layer.init(jax.random.key(1), x)
    assert list(params) == ["params"]
    plain, stored = layer.apply(params, x, mutable=[FEATURES_FIRST])
    (kernel,) = jax.tree.leaves(stored)
    assert kernel.shape == (
        params["params"]["bias"].size,
        params["params"]["kernel"].size // params["params"]["bias"].size,
    )
    np.testing.assert_allclose(layer.apply(params, x), plain, rtol=1e-6)
    np.testing.assert_allclose(layer.apply({**params, **stored}, x), plain, rtol=1e-5, atol=1e-6)
    # It is the stored one that was read.
    doubled = jax.tree.map(lambda kernel: 2 * kernel, stored)
    np.testing.assert_allclose(
        layer.apply({**params, **doubled}, x), 2 * plain, rtol=1e-5, atol=1e-6
    )


def test_many_rows_read_the_kernel_itself(monkeypatch):
    monkeypatch.setattr(matmul, "_ROWS", 5)
    layer, _ = LAYERS["dense"]
    x = jnp.ones((2, 3, 4))
    params = layer.init(jax.random.key(1), x)
    plain, stored = layer.apply(params, x, mutable=[FEATURES_FIRST])
    doubled = jax.tree.map(lambda kernel: 2 * kernel, stored)
    np.testing.assert_array_equal(layer.apply({**params, **doubled}, x), plain)
    assert (layer.apply({**params, **doubled}, x[:1]) != plain[:1]).all()


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_kernels_cast_once_are_those_that_a_layer_casts(module):
    module = module.clone(dtype=jnp.bfloat16, dropout=0.0)
    bits = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 4, 4, 6))
    params = small.random_params(module)
    cast = cast_kernels(params, jnp.bfloat16)
    for path, leaf in jax.tree.leaves_with_path(cast):
        names = [key.key for key in path]
        dense = names[-1] == "kernel" or (names[-1] == "bias" and "norm" not in names[-2])
        assert leaf.dtype == (jnp.bfloat16 if dense else jnp.float32), names

    def loss(params):
        rngs = {"loss": jax.random.key(2)}
        return module.apply({"params": params}, bits, jnp.array([1, 2]), rngs=rngs, method="loss")

    jax.tree.map(np.testing.assert_array_equal, jax.jit(loss)(cast), jax.jit(loss)(params))
