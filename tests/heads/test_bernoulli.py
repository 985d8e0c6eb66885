"""The Bernoulli head: its noise schedule, its chain, guidance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitgen.errors import UserError
from bitgen.heads.bernoulli import BernoulliHead, chain_times, marginal, posterior
from bitgen.samplers.images import image_keys

HEAD = BernoulliHead(bits=5, width=16, layers=2, steps=20)


@pytest.fixture(scope="module")
def params():
    """Random parameters, none of them zero."""
    made = functools.partial(HEAD.init, method="loss")
    bits, cond, key = jnp.ones((3, 5), bool), jnp.ones((3, 8)), jax.random.key(1)
    shapes = jax.eval_shape(lambda: made(jax.random.key(0), bits, cond, key)["params"])
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), shapes)


def sample(params, cond, uncond, **settings):
    keys = image_keys(3, np.arange(len(cond)))
    return HEAD.apply({"params": params}, cond, uncond, keys, method="sample", **settings)


@pytest.mark.parametrize("steps", [1, 2, 7, 20])
def test_times_of_a_chain_ascend_to_the_last_step(steps):
    times = chain_times(20, steps)
    assert len(times) == steps
    assert (np.diff(times) > 0).all()
    assert times[0] == 1
    assert steps == 1 or times[-1] == 20


@pytest.mark.parametrize("steps", [0, 21])
def test_a_chain_of_impossible_length_is_one_clear_error(steps):
    with pytest.raises(UserError, match=f"denoiser steps must be from 1 to 20, got {steps}"):
        chain_times(20, steps)


def test_noise_goes_from_the_bits_to_fair_coins():
    bits = jnp.array([[0.0, 1.0]])
    np.testing.assert_array_equal(marginal(bits, 0, 20), bits)
    np.testing.assert_array_equal(marginal(bits, 20, 20), jnp.full((1, 2), 0.5))
    np.testing.assert_allclose(marginal(bits, 5, 20), [[0.125, 0.875]])


def test_the_posterior_is_bayes_rule_by_counting():
    """Of 400,000 bits noised to step 4 and on to step 9, those that agree with each noisy bit."""
    rng, count, total, before, t = np.random.default_rng(0), 400_000, 20, 4, 9
    clean = np.full(count, 0.7)
    at_before = rng.random(count) < np.asarray(marginal(jnp.asarray(clean[:1]), before, total))
    keep = rng.random(count) < (total - t) / (total - before)
    noisy = np.where(keep, at_before, rng.random(count) < 0.5)
    for value in (0.0, 1.0):
        counted = at_before[noisy == value].mean()
        found = posterior(jnp.array([0.7]), jnp.array([value]), t, before, total)
        assert abs(float(found[0]) - counted) < 5 * 0.5 / np.sqrt((noisy == value).sum())


def test_guidance_one_equals_none_and_more_moves_away(params):
    cond, uncond = jax.random.normal(jax.random.key(5), (2, 2, 3, 8))
    alone = sample(params, cond, None, steps=4)
    guided = {scale: sample(params, cond, uncond, steps=4, scale=scale) for scale in (1.0, 3.0)}
    np.testing.assert_allclose(guided[1.0], alone, atol=1e-6)
    assert np.abs(guided[3.0] - alone).max() > 0.01


def test_an_image_does_not_depend_on_its_batch(params):
    cond = jax.random.normal(jax.random.key(6), (3, 2, 8))
    together = sample(params, cond, None, steps=4)
    np.testing.assert_allclose(sample(params, cond[:1], None, steps=4), together[:1], atol=1e-6)
