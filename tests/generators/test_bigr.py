"""BiGR: what must hold of its sampler whatever the weights."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from bitgen import build
from bitgen.errors import UserError
from bitgen.generators.bigr import BiGR
from bitgen.runtime.mesh import make_mesh
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
    """Parameters that are nowhere zero, so that labels and steps matter."""
    shapes = build.param_shapes(SMALL)
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    scale = [0.5 / max(s.shape[-1], 2) ** 0.5 * 3 for s in leaves]
    values = [
        jax.random.normal(key, s.shape) * c for key, s, c in zip(keys, leaves, scale, strict=True)
    ]
    return jax.tree.unflatten(tree, values)


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


def test_an_image_does_not_depend_on_its_batch(params):
    whole = np.asarray(draw(params, [0, 1, 2, 3], [0, 1, 2, 3]))
    parts = [np.asarray(draw(params, [label], [label])) for label in range(4)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))
    assert (whole[0] != np.asarray(draw(params, [0], [5]))[0]).any()


def test_an_image_does_not_depend_on_the_mesh(params):
    labels, keys = jnp.arange(8) % 5, image_keys(7, np.arange(8))

    def on(devices):
        mesh = make_mesh(devices=jax.devices()[:devices])
        return jax.jit(
            jax.shard_map(
                lambda p, c, k: sample_bits(SMALL, p, c, k, PLAN),
                mesh=mesh,
                in_specs=(P(), P("data"), P("data")),
                out_specs=P("data"),
                check_vma=False,
            )
        )(params, labels, keys)

    np.testing.assert_array_equal(on(1), on(8))


def test_guidance_of_1_equals_no_guidance(params):
    plain = draw(params, [1, 2], [0, 1], dataclasses.replace(PLAN, guidance=1.0))
    # 'linear' reaches 1 + (g - 1): with g a hair above 1 both halves run, and must cancel.
    guided = draw(params, [1, 2], [0, 1], dataclasses.replace(PLAN, guidance=1.0 + 1e-7))
    np.testing.assert_array_equal(plain, guided)
    strong = draw(params, [1, 2], [0, 1], dataclasses.replace(PLAN, guidance=30.0))
    assert (np.asarray(plain) != np.asarray(strong)).any()


def test_unguided_sampling_runs_half_a_batch(params):
    def flops(guidance):
        plan = dataclasses.replace(PLAN, guidance=guidance)
        f = jax.jit(lambda p, k: sample_bits(SMALL, p, jnp.zeros(2, jnp.int32), k, plan))
        return f.lower(params, image_keys(0, np.arange(2))).compile().cost_analysis()["flops"]

    assert flops(1.0) < 0.6 * flops(2.0)


def test_mixing_classes_starts_and_ends_at_them(params):
    first, last = (
        SMALL.apply({"params": params}, jnp.full(2, c), method="embed_labels") for c in (1, 3)
    )
    np.testing.assert_array_equal(draw(params, first, [0, 1]), draw(params, [1, 1], [0, 1]))
    np.testing.assert_array_equal(draw(params, last, [0, 1]), draw(params, [3, 3], [0, 1]))
    middle = draw(params, 0.5 * first + 0.5 * last, [0, 1])
    assert middle.shape == (2, 4, 4, 6)


def test_every_schedule_runs_and_an_unknown_one_is_named(params):
    for guidance in ("constant", "linear"):
        for gumbel in ("constant", "up", "down"):
            plan = dataclasses.replace(PLAN, guidance_schedule=guidance, gumbel_schedule=gumbel)
            assert make_schedule(plan, 16).guidance.dtype == np.float32
    for field in ("guidance_schedule", "gumbel_schedule", "order"):
        with pytest.raises(UserError, match="sideways"):
            draw(params, [0], [0], dataclasses.replace(PLAN, **{field: "sideways"}))
    with pytest.raises(UserError, match="from 1 to 16, got 17"):
        draw(params, [0], [0], dataclasses.replace(PLAN, denoiser_steps=17))


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


def test_remat_changes_nothing(params):
    bits = jax.random.bernoulli(jax.random.key(1), 0.5, (2, 4, 4, 6))

    def gradient(module):
        def loss(p):
            rngs = {"loss": jax.random.key(0)}
            return module.apply(
                {"params": p}, bits, jnp.arange(2), train=False, rngs=rngs, method="loss"
            )[0]

        return jax.jit(jax.grad(loss))(params)

    plain, saved = gradient(SMALL), gradient(SMALL.clone(remat=True))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), plain, saved)


@pytest.mark.parametrize(
    ("fields", "millions"),
    [
        ({}, 336),
        (
            {
                "width": 1280,
                "layers": 36,
                "heads": 20,
                "denoiser_width": 1280,
                "denoiser_layers": 6,
            },
            799,
        ),
        (
            {
                "width": 1536,
                "layers": 48,
                "heads": 24,
                "denoiser_width": 1536,
                "denoiser_layers": 8,
            },
            1480,
        ),
        ({"bits": 32, "grid": (32, 32), "denoiser_width": 1280, "denoiser_layers": 6}, 373),
    ],
)
def test_published_parameter_counts(fields, millions):
    shapes = build.param_shapes(BiGR(**fields))
    size = sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) / 1e6
    assert abs(size - millions) < 0.01 * millions, size


def test_a_width_that_does_not_split_is_one_clear_error():
    with pytest.raises(UserError, match="divisible by 4"):
        build.make_module("generator", "bigr", {"width": 36, "heads": 2})
