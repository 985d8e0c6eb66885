"""Accumulated gradients against those of the whole batch, and frozen parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitgen import config
from bitgen.errors import UserError
from bitgen.profiling.flops import count_flops
from bitgen.runtime.mesh import make_mesh, replicated, to_device
from bitgen.training import optim

PARAMS = {
    "below": {"kernel": np.linspace(-1, 1, 18).reshape(3, 6).astype(np.float32)},
    "head": {"kernel": np.linspace(-2, 1, 12).reshape(6, 2).astype(np.float32)},
}


def batch_of(size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(size, 3)).astype(np.float32),
        "label": rng.integers(0, 2, size).astype(np.int32),
    }


def loss(params, batch, key):
    """A classifier's: the mean over examples, and a metric of half the precision."""
    del key
    logits = jnp.tanh(batch["x"] @ params["below"]["kernel"]) @ params["head"]["kernel"]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], 1)
    right = logits.argmax(1) == batch["label"]
    return -picked.mean(), {"right": right.mean(dtype=jnp.bfloat16), "logits": logits.mean(0)}


def test_parts_give_the_gradients_of_the_whole_on_eight_devices():
    mesh = make_mesh()
    params = jax.device_put(PARAMS, replicated(mesh))
    batch, key = to_device(batch_of(64), mesh), jax.random.key(0)
    program = jax.jit(optim.accumulate_gradients, static_argnums=(0, 4))
    (value, metrics), gradients = program(loss, params, batch, key, 1)
    for parts in (2, 4, 8):
        (v, m), g = program(loss, params, batch, key, parts)
        assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves((v, m, g)))
        np.testing.assert_allclose(v, value, rtol=1e-6)
        np.testing.assert_allclose(m["right"], metrics["right"].astype(jnp.float32), atol=0.01)
        np.testing.assert_allclose(m["logits"], metrics["logits"], rtol=1e-5, atol=1e-6)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), g, gradients)


def test_examples_stay_on_their_devices():
    mesh = make_mesh()
    params = jax.device_put(PARAMS, replicated(mesh))
    batch, key = to_device(batch_of(64), mesh), jax.random.key(0)
    program = jax.jit(optim.accumulate_gradients, static_argnums=(0, 4))
    text = program.lower(loss, params, batch, key, 4).compile().as_text()
    assert "all-reduce" in text  # of the gradients
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in text


def test_each_part_has_examples_and_a_key_of_its_own():
    def parts(batch, key):
        return {"x": batch["x"].mean(0), "noise": jax.random.normal(key, (3,)), "n": batch["n"][0]}

    batch = {"x": jnp.asarray(batch_of(6)["x"]), "n": jnp.arange(6)}
    got = optim.mean_of_parts(parts, batch, jax.random.key(3), 3)
    key = jax.random.key(3)
    noise = [jax.random.normal(jax.random.fold_in(key, i), (3,)) for i in range(3)]
    np.testing.assert_allclose(got["noise"], np.mean(noise, 0), rtol=1e-6)
    np.testing.assert_allclose(got["x"], batch["x"].mean(0), rtol=1e-5, atol=1e-6)
    assert got["n"] == (0 + 1 + 2) / 3  # the first examples of the parts
    whole = optim.mean_of_parts(parts, batch, jax.random.key(4), 1)
    np.testing.assert_array_equal(whole["noise"], jax.random.normal(jax.random.key(4), (3,)))


def test_operations_of_a_step_do_not_depend_on_its_parts():
    def flops(parts):
        program = jax.jit(optim.accumulate_gradients, static_argnums=(0, 4))
        traced = program.trace(loss, PARAMS, batch_of(64), jax.random.key(0), parts)
        return count_flops(traced.jaxpr)

    assert flops(1) == flops(4) > 0


def settings(**changes):
    c = config.base().optim
    c.update({"lr": 0.1, "weight_decay": 0.5, "clip": 1.0, **changes})
    return c


def test_frozen_leaves_do_not_change_and_count_nowhere():
    # The frozen gradient is large: in the clipped norm it would hold the others back.
    gradient = jax.tree.map(jnp.ones_like, PARAMS)
    gradient["below"]["kernel"] *= 1e6
    for name in ("adam", "adamw"):
        optimiser = optim.make_optimiser(settings(name=name), 10, ("^below/",))
        state = optimiser.init(PARAMS)
        updates, _ = optimiser.update(gradient, state, PARAMS)
        np.testing.assert_array_equal(updates["below"]["kernel"], 0)
        alone = {"head": PARAMS["head"]}
        plain = optim.make_optimiser(settings(name=name), 10)
        expected, _ = plain.update({"head": gradient["head"]}, plain.init(alone), alone)
        np.testing.assert_array_equal(updates["head"]["kernel"], expected["head"]["kernel"])
        moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
        assert moments == [(6, 2), (6, 2)]


def test_which_leaves_are_trained():
    mask = optim.trained(PARAMS, ("^head/.*nel$",))
    assert mask == {"below": {"kernel": True}, "head": {"kernel": False}}
    new = jax.tree.map(lambda x: x + 1, PARAMS)
    merged = optim.where_trained(mask, new, PARAMS)
    assert merged["below"]["kernel"] is new["below"]["kernel"]
    assert merged["head"]["kernel"] is PARAMS["head"]["kernel"]


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("^decoder", r"'\^decoder' matches no parameter; some paths are below/kernel"),
        ("(", "is not a regular expression"),
    ],
)
def test_bad_patterns_are_named(pattern, message):
    optimiser = optim.make_optimiser(settings(), 10, ("^head", pattern))
    with pytest.raises(UserError, match=message):
        optimiser.init(PARAMS)
