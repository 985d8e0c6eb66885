"""The quantisers: one interface, gradients straight through, losses as their papers have them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitgen.errors import UserError
from bitgen.tokenizers.quantizers import QUANTIZERS, Bernoulli, Sign, Spherical, make_quantizer

SHAPE = (2, 3, 3, 8)


def values(seed=0, scale=1.0, shape=SHAPE):
    return jax.random.normal(jax.random.key(seed), shape) * scale


def xlogy(p, q):
    return np.where(p > 0, p * np.log(np.where(q > 0, q, 1)), 0)


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_codes_are_those_of_the_bits(name):
    quantizer = make_quantizer(name)
    z = values().at[0, 0, 0, 0].set(0)
    codes, bits, losses = quantizer(z)
    assert bits.dtype == bool
    np.testing.assert_array_equal(bits, z > 0)
    np.testing.assert_array_equal(quantizer.bits(z), bits)
    np.testing.assert_allclose(codes, quantizer.codes(bits), atol=1e-6)
    assert codes.dtype == quantizer.codes(bits).dtype == jnp.float32
    assert losses
    for loss in losses.values():
        assert loss.shape == ()
        assert loss.dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "off", "on"), [("bernoulli", 0, 1), ("sign", -1, 1), ("spherical", -0.5, 0.5)]
)
def test_values_of_the_codes(name, off, on):
    bits = jnp.asarray([[True, False, False, True]])
    np.testing.assert_allclose(make_quantizer(name).codes(bits), [[on, off, off, on]])


@pytest.mark.parametrize(
    ("name", "soft"),
    [
        ("bernoulli", jax.nn.sigmoid),
        ("sign", lambda z: z),
        ("spherical", lambda z: z / jnp.linalg.norm(z, axis=-1, keepdims=True)),
    ],
)
def test_gradient_is_that_of_the_input(name, soft):
    z, weights = values(1), values(2)
    ours = jax.grad(lambda z: jnp.sum(make_quantizer(name)(z).codes * weights))(z)
    np.testing.assert_allclose(ours, jax.grad(lambda z: jnp.sum(soft(z) * weights))(z), atol=1e-6)


@pytest.mark.parametrize("name", list(QUANTIZERS))
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4])
def test_losses_and_their_gradients_are_finite(name, scale):
    def total(z):
        return sum(make_quantizer(name)(z).losses.values())

    loss, gradient = jax.value_and_grad(total)(values(3, scale))
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", list(QUANTIZERS))
def test_half_precision_input_is_quantised_in_float32(name):
    z = values(4).astype(jnp.bfloat16)
    codes, bits, losses = make_quantizer(name)(z)
    want = make_quantizer(name)(z.astype(jnp.float32))
    assert codes.dtype == jnp.float32
    np.testing.assert_array_equal(bits, want.bits)
    for loss, wanted in zip(losses.values(), want.losses.values(), strict=True):
        np.testing.assert_allclose(loss, wanted, rtol=1e-6)


def test_bernoulli_draws_bits_with_their_probabilities():
    z = values(5)
    keys = jax.random.split(jax.random.key(6), 400)
    drawn = jax.vmap(lambda key: Bernoulli()(z, key).bits)(keys).mean(0)
    assert np.abs(drawn - jax.nn.sigmoid(z)).max() < 5 * 0.5 / np.sqrt(400)
    rounded = Bernoulli(deterministic=True)(z, jax.random.key(7)).bits
    np.testing.assert_array_equal(rounded, z > 0)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_sign_entropies_against_every_code_by_itself(groups):
    """In float64, over each position and group, and each code: softmax of -|z - code|^2 / T."""
    quantizer = Sign(groups, temperature=0.7)
    z = np.asarray(values(8), np.float64)
    size = SHAPE[-1] // groups
    codes = list(itertools.product((-1, 1), repeat=size))
    distributions = []
    for vector in z.reshape(-1, SHAPE[-1]):
        for group in np.split(vector, groups):
            likelihood = np.exp([-np.sum((group - code) ** 2) / 0.7 for code in codes])
            distributions.append(likelihood / likelihood.sum())
    sample = np.mean([-xlogy(p, p).sum() for p in distributions])
    mean = np.mean(distributions, axis=0)
    batch = -(mean * np.log(mean + 1e-5)).sum()
    ours = quantizer.entropies(jnp.asarray(z, jnp.float32))
    np.testing.assert_allclose(ours, (sample, batch), rtol=1e-5)
    loss = quantizer(jnp.asarray(z, jnp.float32)).losses
    np.testing.assert_allclose(loss["entropy"], sample - batch, rtol=1e-4)
    np.testing.assert_allclose(loss["commitment"], np.mean((z - np.sign(z)) ** 2), rtol=1e-5)


def test_sign_entropies_at_their_ends():
    sure = jnp.asarray(list(itertools.product((-3.0, 3.0), repeat=4)))
    np.testing.assert_allclose(Sign(1).entropies(sure), (0, 4 * np.log(2)), atol=1e-3)
    np.testing.assert_allclose(Sign(2).entropies(sure), (0, 2 * np.log(2)), atol=1e-3)
    same = jnp.full((16, 4), 3.0)
    np.testing.assert_allclose(Sign(1).entropies(same), (0, 0), atol=1e-3)
    unsure = jnp.zeros((16, 4))
    np.testing.assert_allclose(Sign(1).entropies(unsure), (4 * np.log(2), 4 * np.log(2)), atol=1e-3)


def test_sign_needs_bits_that_split_into_groups():
    with pytest.raises(UserError, match="8 bits do not split into 3 groups"):
        Sign(3)(values())


def test_spherical_entropies_are_those_of_independent_bits():
    """By hand over all codes: probabilities of a code are the product of those of its bits."""
    quantizer = Spherical(inverse_temperature=2.0, diversity=0.5)
    z = np.asarray(values(9, shape=(6, 4)), np.float64)
    z /= np.linalg.norm(z, axis=-1, keepdims=True)
    on = 1 / (1 + np.exp(-4 * z / 2 * 2.0))
    sample = []
    for probs in on:
        joint = [
            np.prod([p if bit else 1 - p for p, bit in zip(probs, code, strict=True)])
            for code in itertools.product((0, 1), repeat=4)
        ]
        sample.append(-xlogy(np.array(joint), np.array(joint)).sum())
    mean = on.mean(0)
    batch = -(xlogy(mean, mean) + xlogy(1 - mean, 1 - mean)).sum()
    losses = quantizer(jnp.asarray(z, jnp.float32) * 3).losses
    np.testing.assert_allclose(losses["entropy"], (np.mean(sample) - 0.5 * batch) / 2, rtol=1e-4)
    commitment = np.mean(np.sum((z - np.sign(z) / 2) ** 2, -1))
    np.testing.assert_allclose(losses["commitment"], commitment, rtol=1e-5)


def test_an_unknown_quantizer_is_named():
    with pytest.raises(UserError, match=r"unknown quantizer 'round', have \['bernoulli', 'sign'"):
        make_quantizer("round")
