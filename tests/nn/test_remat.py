"""What layers save for their gradients, and dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small

from bitgen import build
from bitgen.generators.bigr import BiGR
from bitgen.generators.bitdance import BitDance
from bitgen.nn.remat import Dropout

SIZES = {"width": 32, "layers": 3, "heads": 2, "bits": 6, "grid": (4, 4), "num_classes": 4}
MODULES = {
    "bigr": BiGR(**SIZES, denoiser_width=16, denoiser_layers=2, mlp_multiple=16, dropout=0.5),
    "bitdance": BitDance(
        **SIZES,
        head_width=16,
        head_layers=2,
        mlp_multiple=16,
        class_tokens=2,
        together=4,
        dropout=0.5,
    ),
}
HOW = {
    "everything": {"remat": None},
    "products": {"remat": False},
    "unrolled": {"remat": False, "unroll": True},
    "inputs": {"remat": True},
}


@pytest.fixture(params=MODULES)
def case(request):
    """-> f(fields): what the gradient keeps, and the gradient, by a model with these fields."""
    module = MODULES[request.param]
    bits = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 4, 4, 6))
    labels = jnp.array([1, 2])
    params = {"params": small.random_params(module)}

    def run(fields):
        rngs = {"loss": jax.random.key(3), "dropout": jax.random.key(4)}

        def loss(params):
            return module.clone(**fields).apply(params, bits, labels, rngs=rngs, method="loss")[0]

        pullback = jax.eval_shape(lambda p: jax.vjp(loss, p)[1], params)
        kept = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(pullback))
        return kept, jax.jit(jax.value_and_grad(loss))(params)

    return run


def test_what_is_kept_changes_no_gradient(case):
    """Dropout included, which draws the same again or is kept."""
    kept, results = zip(*(case(fields) for fields in HOW.values()), strict=True)
    for result in results[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), result, results[0]
        )
    sizes = dict(zip(HOW, kept, strict=True))
    assert sizes["inputs"] < sizes["products"] < 0.8 * sizes["everything"], sizes
    assert sizes["unrolled"] == sizes["products"]


@pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)
def test_initial_parameters_of_unrolled_layers_compile_as_a_loop(module):
    def program(unroll):
        init = functools.partial(build.init_params, module.clone(unroll=unroll))
        return jax.jit(init).lower(jax.random.key(0)).as_text()

    assert program(True) == program(False)


@pytest.mark.parametrize("shape", [(400, 50), (3, 100, 51)])
def test_dropout_drops_its_share_and_keeps_the_mean(shape):
    def run(rate, x):
        return Dropout(rate).apply({}, x, rngs={"dropout": jax.random.key(0)})

    x = jnp.ones(shape, jnp.bfloat16)
    y = np.asarray(run(0.25, x), np.float32)
    assert set(np.unique(y)) == {0, np.float32(jnp.bfloat16(4 / 3))}
    assert abs((y == 0).mean() - 0.25) < 0.02
    # Neighbours of one random word are drawn apart.
    pairs = y[..., : 2 * (shape[-1] // 2)].reshape(-1, 2) == 0
    assert abs(pairs.all(1).mean() - 0.25**2) < 0.02
    np.testing.assert_array_equal(run(0.0, x), x)
    gradient = jax.grad(lambda x: run(0.25, x).sum().astype(jnp.float32))(x)
    np.testing.assert_array_equal(np.asarray(gradient, np.float32), y)
