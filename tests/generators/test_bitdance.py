"""BitDance: its order, its masks, its loss, and what is special to its sampler."""

import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small

from bitgen import build
from bitgen.errors import UserError
from bitgen.generators.bitdance import BitDance, block_causal_mask, flip
from bitgen.nn import attention
from bitgen.samplers import autoregressive
from bitgen.samplers.autoregressive import AutoregressivePlan, sample_bits
from bitgen.samplers.images import image_keys

SMALL = BitDance(
    width=32,
    layers=2,
    heads=2,
    bits=6,
    grid=(4, 4),
    num_classes=5,
    class_tokens=3,
    head_width=64,
    head_layers=2,
    mlp_multiple=32,
)
PLAN = AutoregressivePlan(guidance=2.0, head_steps=3, segments=2)
TOGETHER = [1, 4, 16]


def random_params(module):
    """Random parameters, smaller than usual: larger ones saturate the flow."""
    return jax.tree.map(lambda x: x / 2, small.random_params(module))


@pytest.fixture(scope="module")
def models():
    modules = {p: SMALL.clone(together=p) for p in TOGETHER}
    return {p: (module, random_params(module)) for p, module in modules.items()}


# The module and the plan are static: one program for all draws of a shape.
sample = jax.jit(sample_bits, static_argnums=(0, 4))


def draw(model, labels, indices, plan=PLAN):
    keys = image_keys(7, np.asarray(indices))
    return np.asarray(sample(*model, jnp.array(labels), keys, plan))


@pytest.mark.parametrize("together", TOGETHER)
def test_the_cache_gives_what_a_whole_sequence_gives(models, together):
    module, params = models[together]
    labels = jnp.array([0, 3, module.num_classes])
    bits = jax.random.bernoulli(jax.random.key(1), 0.5, (3, 4, 4, 6))
    whole = module.apply({"params": params}, bits, labels, method="hidden")
    groups = module.order(bits)

    @jax.jit
    def walk(params):
        prepared = autoregressive.prepare(module, params)
        caches, cond = autoregressive.start(module, prepared, labels)
        caches, conds = autoregressive.grow(caches, module.length), [cond]
        for index in range(1, module.tokens // together):
            caches, cond = autoregressive.advance(
                module, prepared, caches, groups[:, index - 1], jnp.array(index)
            )
            conds.append(cond)
        return jnp.concatenate(conds, axis=1)

    np.testing.assert_allclose(walk(params), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("together", TOGETHER)
def test_a_token_reads_only_what_was_drawn_before_its_group(models, together):
    module, params = models[together]
    bits = jax.random.bernoulli(jax.random.key(1), 0.5, (1, 16 // together, together, 6))
    hidden = jax.jit(lambda b: module.apply({"params": params}, b, jnp.array([2]), method="hidden"))
    before = hidden(module.arrange(bits))
    for group in range(16 // together):
        moved = hidden(module.arrange(bits.at[:, group].set(~bits[:, group])))
        same = np.isclose(before, moved, rtol=0, atol=1e-6).all((0, 2)).reshape(-1, together)
        assert same[: group + 1].all(), group
        assert not same[group + 1 :].any(), group


def test_the_number_of_segments_changes_nothing(models):
    drawn = [
        draw(models[1], [1, 2], [0, 1], AutoregressivePlan(2.0, head_steps=2, segments=n))
        for n in (1, 4, 99)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    np.testing.assert_array_equal(drawn[0], drawn[2])


def test_modulations_at_once_or_at_each_step_are_the_same(models, monkeypatch):
    at_once = draw(models[4], [0, 1], [0, 1])
    monkeypatch.setattr("bitgen.heads.rectified_flow._MODULATIONS_AT_ONCE", 0)
    sample.clear_cache()
    np.testing.assert_array_equal(draw(models[4], [0, 1], [0, 1]), at_once)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_any_number_of_head_steps(models, steps):
    assert draw(models[16], [0], [0], AutoregressivePlan(1.0, head_steps=steps)).dtype == bool


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"together": 8}, "grid of 4 x 4 tokens: patches of together=8 tokens do not"),
        ({"together": 9}, "grid of 4 x 4 tokens: patches of together=9 tokens do not"),
        ({"together": 3, "patch_order": False}, "16 tokens are not a multiple of together=3"),
        ({"cells": 3}, r"grid \(4, 4\) is not a multiple of cells 3"),
        ({"head_layers": 5, "head_modulations": 2}, "multiple of its modulations, got 5 and 2"),
    ],
)
def test_settings_that_make_no_model(fields, message):
    with pytest.raises(UserError, match=message):
        build.param_shapes(SMALL.clone(**fields))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"together": 4},
        {"together": 16},
        {"together": 2, "patch_order": False},
        {"cells": 2},
        {"cells": 2, "together": 4},
    ],
)
def test_order_visits_each_cell_once_and_arrange_undoes_it(fields):
    module = SMALL.clone(**fields)
    # Each cell its own pattern.
    numbers = np.arange(16).reshape(1, 4, 4, 1)
    bits = jnp.asarray((numbers >> np.arange(6)) & 1).astype(bool)
    groups = module.order(bits)
    p, k = module.together, module.token_bits
    assert groups.shape == (1, module.tokens // p, p, k)
    np.testing.assert_array_equal(module.arrange(groups), bits)


def test_groups_are_square_patches():
    numbers = np.arange(16).reshape(1, 4, 4, 1)
    bits = jnp.asarray((numbers >> np.arange(6)) & 1).astype(bool)
    groups = np.asarray(SMALL.clone(together=4).order(bits))
    cells = (groups << np.arange(6)).sum(-1)[0]
    expected = [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    np.testing.assert_array_equal(cells, expected)


def test_mask_of_groups():
    expected = """
        100000
        110000
        111100
        111100
        111111
        111111
    """
    expected = np.array([[c == "1" for c in row] for row in expected.split()])
    np.testing.assert_array_equal(block_causal_mask(6, 2, 2), expected)
    np.testing.assert_array_equal(block_causal_mask(5, 2, 1), np.tri(5, dtype=bool))


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("implementation", ["auto", "xla", "padded"])
def test_gradients_are_finite_at_the_length_of_training(monkeypatch, together, implementation):
    if implementation == "padded":  # as for cuDNN, whose kernels want multiples of 64
        implementation = "xla"
        monkeypatch.setitem(attention.LENGTH_MULTIPLES, "xla", (2, 64))
    module = SMALL.clone(
        grid=(16, 16),
        class_tokens=64,
        together=together,
        attention=implementation,
        dtype=jnp.bfloat16,
    )
    assert module.length == 319
    params = random_params(module)
    bits = jax.random.bernoulli(jax.random.key(1), 0.5, (1, 16, 16, 6))

    def loss(params):
        rngs = {"loss": jax.random.key(2)}
        return module.apply({"params": params}, bits, jnp.array([1]), rngs=rngs, method="loss")[0]

    value, gradient = jax.jit(jax.value_and_grad(loss))(params)
    assert np.isfinite(value)
    for path, leaf in jax.tree.leaves_with_path(gradient):
        assert np.isfinite(leaf).all(), path
        assert np.abs(leaf).max() > 0, path


@pytest.mark.parametrize("together", [0, 1, 4])
def test_padding_the_length_changes_nothing(monkeypatch, together):
    """Without a mask, causal, and by groups."""
    mask = block_causal_mask(21, 5 if together == 4 else 0, together) if together else None
    q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 21, 2, 8))

    def value(q, k, v):
        y = attention.attend(q, k, v, mask, "xla")
        return (y**2).sum(), y

    run = jax.value_and_grad(value, (0, 1, 2), has_aux=True)
    (_, plain), gradients = run(q, k, v)
    monkeypatch.setitem(attention.LENGTH_MULTIPLES, "xla", (2, 64))
    (_, padded), padded_gradients = run(q, k, v)
    np.testing.assert_allclose(padded, plain, atol=1e-5)
    for one, other in zip(padded_gradients, gradients, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize(
    ("implementation", "message"),
    [
        ("flash", r"unknown config.model.attention 'flash', have \['auto', 'cudnn', 'xla'\]"),
        pytest.param(
            "cudnn",
            "config.model.attention=cudnn: cuDNN is not detected. Set auto or xla",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("jax_plugins") is not None, reason="cuDNN may be here"
            ),
        ),
    ],
)
def test_attention_that_is_not_here_is_one_clear_error(implementation, message):
    x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    with pytest.raises(UserError, match=message):
        attention.attend(x, x, x, None, implementation)


def test_flips_are_half_the_rate_and_leave_the_targets_alone(models):
    bits = jnp.zeros((64, 4, 4, 6), bool)
    flipped = flip(bits, 0.4, jax.random.key(0))
    assert abs(float(flipped.mean()) - 0.2) < 0.02
    np.testing.assert_array_equal(flip(bits, 0.0, jax.random.key(0)), bits)

    module, params = models[1]
    losses = [
        module.clone(flip_rate=rate, label_dropout=0.0).apply(
            {"params": params},
            bits[:8],
            jnp.zeros(8, jnp.int32),
            train=train,
            rngs={"loss": jax.random.key(2)},
            method="loss",
        )[0]
        for rate, train in ((0.0, True), (1.0, True), (1.0, False))
    ]
    assert losses[0] == losses[2] != losses[1]


def test_features_of_every_layer(models):
    module, params = models[4]
    bits = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 4, 4, 6))
    labels = jnp.array([1, 2])
    features = module.apply({"params": params}, bits, labels, method="features")
    assert features.shape == (2, 2, 16, 32)
    hidden = module.apply({"params": params}, bits, labels, method="hidden")
    last = features[-1] / np.sqrt((features[-1] ** 2).mean(-1, keepdims=True) + 1e-6)
    last = last * params["norm"]["scale"].reshape(1, 1, -1)
    np.testing.assert_allclose(last + params["position_embedding"][None], hidden, atol=1e-4)
