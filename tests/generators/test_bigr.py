"""BiGR: its loss, its sizes, and what is special to its sampler."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small

from bitgen import build
from bitgen.errors import UserError
from bitgen.generators.bigr import BiGR
from bitgen.samplers.images import image_keys
from bitgen.samplers.masked import MaskedPlan, iteration, make_schedule, sample_bits

SMALL = BiGR(
    width=32,
    layers=2,
    heads=2,
    bits=6,
    grid=(4, 4),
    num_classes=5,
    denoiser_width=32,
    denoiser_layers=1,
    diffusion_steps=16,
    mlp_multiple=32,
)
PLAN = MaskedPlan(iterations=5, guidance=2.0, gumbel=0.5, denoiser_steps=4, segments=2)


@pytest.fixture(scope="module")
def params():
    return small.random_params(SMALL)


def draw(params, labels, indices, plan=PLAN, **options):
    keys = image_keys(7, np.asarray(indices))
    labels = jnp.asarray(labels)
    return jax.jit(lambda p, c, k: sample_bits(SMALL, p, c, k, plan, **options))(
        params, labels, keys
    )


@pytest.mark.parametrize("tokens", [1, 3, 16, 256])
@pytest.mark.parametrize("count", [1, 4, 20])
@pytest.mark.parametrize("order", ["cosine", "linear"])
def test_schedule_draws_each_token_once(tokens, count, order):
    schedule = make_schedule(MaskedPlan(iterations=count, order=order), tokens)
    assert schedule.counts.sum() == tokens
    assert schedule.counts.min() > 0
    assert schedule.left[0] == tokens
    np.testing.assert_array_equal(schedule.left[1:], tokens - schedule.counts.cumsum()[:-1])


def test_each_iteration_draws_its_count_and_keeps_the_rest(params):
    schedule = make_schedule(PLAN, 16)
    keys = image_keys(7, np.arange(3))
    classes = SMALL.apply({"params": params}, jnp.array([0, 1, 2]), method="embed_labels")
    bits, mask = jnp.zeros((3, 16, 6), bool), jnp.ones((3, 16), bool)
    for i, count in enumerate(schedule.counts):
        x = (i, int(count), float(schedule.guidance[i]), float(schedule.gumbel[i]))
        window = int(schedule.left[i])
        new, left = iteration(SMALL, params, classes, keys, PLAN, window, (bits, mask), x)
        np.testing.assert_array_equal((mask & ~left).sum(1), count)
        assert not (left & ~mask).any()
        np.testing.assert_array_equal(
            np.asarray(new)[~np.asarray(mask)], np.asarray(bits)[~np.asarray(mask)]
        )
        bits, mask = new, left
    assert not mask.any()


def test_known_tokens_never_change_and_only_masked_ones_are_drawn(params):
    known = jax.random.bernoulli(jax.random.key(1), 0.5, (4, 4, 4, 6))
    mask = jnp.zeros((4, 16), bool).at[:, jnp.array([0, 3, 4, 9, 10])].set(True).reshape(4, 4, 4)
    new = draw(params, [0, 1, 2, 3], range(4), known=known, mask=mask, masked=5)
    np.testing.assert_array_equal(
        np.asarray(new)[~np.asarray(mask)], np.asarray(known)[~np.asarray(mask)]
    )
    assert (np.asarray(new) != np.asarray(known))[np.asarray(mask)].any()
    # What was under the mask is not read.
    other = jnp.where(mask[..., None], ~known, known)
    again = draw(params, [0, 1, 2, 3], range(4), known=other, mask=mask, masked=5)
    np.testing.assert_array_equal(new, again)


def test_mixing_classes_starts_and_ends_at_them(params):
    first, last = (
        SMALL.apply({"params": params}, jnp.full(2, c), method="embed_labels") for c in (1, 3)
    )
    np.testing.assert_array_equal(draw(params, first, [0, 1]), draw(params, [1, 1], [0, 1]))
    np.testing.assert_array_equal(draw(params, last, [0, 1]), draw(params, [3, 3], [0, 1]))
    middle = draw(params, 0.5 * first + 0.5 * last, [0, 1])
    assert middle.shape == (2, 4, 4, 6)


def test_loss_masks_the_same_count_and_drops_labels(params):
    bits = jax.random.bernoulli(jax.random.key(1), 0.5, (4, 4, 4, 6))
    labels = jnp.arange(4)

    def loss(key, train, module=SMALL):
        rngs = {"loss": key, "dropout": jax.random.fold_in(key, 1)}
        return module.apply({"params": params}, bits, labels, train=train, rngs=rngs, method="loss")

    values, ratios = [], []
    for i in range(20):
        value, metrics = loss(jax.random.key(i), True)
        values.append(float(value))
        ratios.append(float(metrics["mask_ratio"]) * 16)
    assert np.isfinite(values).all()
    np.testing.assert_allclose(ratios, np.round(ratios), atol=1e-4)
    assert min(ratios) >= 1
    always = SMALL.clone(label_dropout=1.0, dropout=0.0)
    never = SMALL.clone(label_dropout=0.0, dropout=0.0)
    key = jax.random.key(3)
    assert float(loss(key, True, always)[0]) != float(loss(key, True, never)[0])
    np.testing.assert_allclose(loss(key, True, never)[0], loss(key, False)[0], rtol=1e-6)


@pytest.mark.parametrize("guidance", ["constant", "linear"])
@pytest.mark.parametrize("gumbel", ["constant", "up", "down"])
def test_every_schedule_is_float32(guidance, gumbel):
    plan = dataclasses.replace(PLAN, guidance_schedule=guidance, gumbel_schedule=gumbel)
    schedule = make_schedule(plan, 16)
    assert schedule.guidance.dtype == schedule.gumbel.dtype == np.float32


@pytest.mark.parametrize(
    ("width", "layers", "denoiser_layers", "others", "millions"),
    [
        (1024, 24, 3, {}, 336),
        (1280, 36, 6, {}, 799),
        (1536, 48, 8, {}, 1480),
        (1024, 24, 6, {"bits": 32, "grid": (32, 32), "denoiser_width": 1280}, 373),
    ],
)
def test_published_parameter_counts(width, layers, denoiser_layers, others, millions):
    sizes = {"width": width, "layers": layers, "heads": width // 64, "denoiser_width": width}
    module = BiGR(**{**sizes, "denoiser_layers": denoiser_layers, **others})
    size = sum(leaf.size for leaf in jax.tree.leaves(build.param_shapes(module))) / 1e6
    assert abs(size - millions) < 0.01 * millions, size


def test_a_width_that_does_not_split_is_one_clear_error():
    with pytest.raises(UserError, match="divisible by 4"):
        build.make_module("generator", "bigr", {"width": 36, "heads": 2})
