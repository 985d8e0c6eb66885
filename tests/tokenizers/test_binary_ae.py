"""The binary autoencoder: bits, gradients through them, and its released sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bitgen import build
from bitgen.errors import UserError
from bitgen.tokenizers.binary_ae import BinaryAutoencoder, decoder_layout, encoder_layout

SMALL = {
    "width": 32,
    "multipliers": (1, 2),
    "blocks": 1,
    "bits": 8,
    "embed_dim": 32,
    "image_size": 16,
    "attention_resolutions": (8,),
}


@pytest.fixture(scope="module")
def small():
    module = BinaryAutoencoder(**SMALL)
    params = build.init_params(module, jax.random.key(0))
    images = jax.random.uniform(jax.random.key(1), (2, 16, 16, 3), minval=-1, maxval=1)
    return module, params, images


def test_encode_rounds_and_decode_gives_images(small):
    module, params, images = small
    probs = module.apply({"params": params}, images, method="probs")
    bits = module.apply({"params": params}, images, method="encode")
    assert bits.dtype == bool
    assert bits.shape == (2, *module.grid, 8)
    np.testing.assert_array_equal(bits, probs > 0.5)
    decoded = module.apply({"params": params}, bits, method="decode")
    assert decoded.shape == images.shape
    assert decoded.dtype == jnp.float32


def test_training_draws_bits_with_their_probabilities(small):
    module, params, images = small
    probs = module.apply({"params": params}, images, method="probs")

    def draw(key):
        variables = {"params": params}
        return module.apply(variables, images, train=True, rngs={"bits": key})[1]["bits"]

    drawn = jax.vmap(draw)(jax.random.split(jax.random.key(2), 400)).mean(0)
    assert np.abs(drawn - probs).max() < 5 * 0.5 / np.sqrt(400)
    rounded = module.clone(deterministic=True).apply({"params": params}, images, train=True)
    np.testing.assert_array_equal(rounded[1]["bits"], probs > 0.5)


@pytest.mark.parametrize("signed", [False, True])
def test_gradient_is_straight_through(small, signed):
    module, params, images = small
    module = module.clone(signed=signed, deterministic=True)
    weights = jax.random.normal(jax.random.key(3), images.shape)

    def through(p):
        return jnp.sum(module.apply({"params": p}, images, train=True)[0] * weights)

    # By hand: the gradient that reaches the codes goes on to the probabilities as it is.
    probs, to_params = jax.vjp(
        lambda p: module.apply({"params": p}, images, method="probs"), params
    )
    codes = module.apply({"params": params}, images, method="encode").astype(jnp.float32)

    def decode(p, codes):
        # decode() takes bools; floats in {0, 1} reach the same path and have a gradient.
        return jnp.sum(module.apply({"params": p}, codes, method="decode") * weights)

    to_decoder, to_codes = jax.grad(decode, (0, 1))(params, codes)
    expected = jax.tree.map(jnp.add, to_decoder, to_params(to_codes)[0])
    ours = jax.grad(through)(params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(ours):
        want = expected
        for key in path:
            want = want[key.key]
        np.testing.assert_allclose(leaf, want, rtol=2e-3, atol=2e-3, err_msg=str(path))
    assert probs.shape[-1] == 8


def test_last_input_is_what_makes_the_pixels(small):
    module, params, images = small
    recon, aux = module.apply(
        {"params": params}, images, train=True, rngs={"bits": jax.random.key(4)}
    )
    layer = params
    for name in module.last_layer:
        layer = layer[name]
    pixels = jax.lax.conv_general_dilated(
        aux["last_input"],
        layer["kernel"],
        (1, 1),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    np.testing.assert_allclose(
        recon, 2 * (pixels + layer["bias"].reshape(1, 1, 1, -1)) - 1, atol=1e-4
    )


@pytest.mark.parametrize(
    ("fields", "grid", "attention"),
    [
        ({"bits": 24}, 16, 3),  # two residual blocks at 16x16, and the middle
        ({"bits": 128, "decoder_multiplier": 3.0}, 16, 3),
        ({"bits": 32, "image_size": 512}, 32, 1),
    ],
)
def test_released_sizes(fields, grid, attention):
    module = BinaryAutoencoder(**fields)
    assert module.grid == (grid, grid)
    assert sum(kind == "attn" for kind, _, _ in encoder_layout(module)) == attention
    decoder = [kind for kind, _, _ in decoder_layout(module)]
    times = int(fields.get("decoder_multiplier", 1))
    assert decoder.count("res") == 2 + 5 * 2 * times
    assert decoder.count("attn") == 1 + (attention - 1) * times


def test_a_width_that_the_norms_cannot_split_is_one_line():
    module = BinaryAutoencoder(**{**SMALL, "width": 48})
    with pytest.raises(UserError, match=r"48 channels, its norm 32 groups .* multiple of 32"):
        build.param_shapes(module)
