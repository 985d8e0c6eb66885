"""The tokenizers: what all families have in common."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from helpers import tokenizers
from helpers.tokenizers import apply, make

from bitgen import build
from bitgen.errors import UserError
from bitgen.tokenizers.quantizers import QUANTIZERS

MODULES = {
    "binary_ae": make("binary_ae", tokenizers.BINARY_AE),
    "binary_ae signed": make("binary_ae", tokenizers.BINARY_AE, signed=True),
    "bitvae": make("bitvae", tokenizers.BITVAE),
    "gfq_ae": make("gfq_ae", tokenizers.GFQ_AE),
    "gfq_ae noise": make("gfq_ae", tokenizers.GFQ_AE, noise_decoder=True),
    "conv_ae": make("conv_ae", tokenizers.CONV_AE),
    "dcae": make("dcae", tokenizers.DCAE),
    "dcae other": make("dcae", tokenizers.DCAE_OTHER),
    "dcae other, no first stage": make(
        "dcae", tokenizers.DCAE_OTHER, encoder_depths=(0, 1, 1), decoder_depths=(0, 1, 1)
    ),
}
for quantizer in QUANTIZERS:
    for name in ("conv_ae", "dcae"):
        MODULES[f"{name} {quantizer}"] = MODULES[name].clone(quantizer=quantizer)


@pytest.fixture(scope="module", params=MODULES)
def case(request):
    module = MODULES[request.param]
    return module, tokenizers.random_params(module), tokenizers.random_images(module)


def test_the_reconstruction_is_the_decoded_code(case):
    module, params, images = case
    codes = apply(module, params, images, method="encode")
    for code, (h, w) in zip(
        jax.tree.leaves(codes), getattr(module, "scales", [module.grid]), strict=True
    ):
        assert code.dtype == (bool if module.bits else jnp.float32)
        assert code.shape == (2, h, w, module.bits or module.latents)
    decoded = apply(module, params, codes, method="decode")
    recon, aux = apply(module, params, images, train=False)
    assert decoded.shape == recon.shape == images.shape
    assert decoded.dtype == recon.dtype == jnp.float32
    np.testing.assert_allclose(recon, decoded, atol=2e-5)
    assert aux.keys() == {"losses", "last_input"} | ({"bits"} if module.bits else set())
    jax.tree.map(np.testing.assert_array_equal, aux.get("bits", codes), codes)


def test_the_last_layer_makes_the_images(case):
    module, params, images = case
    recon, aux = apply(module, params, images, train=False)
    pixels = tokenizers.last_layer(module, params, aux["last_input"])
    # Pixels in [0, 1] become images in [-1, 1].
    np.testing.assert_allclose(recon, pixels - (module.image_scale == 2), atol=1e-4)


@pytest.mark.parametrize("name", ["binary_ae", "bitvae", "gfq_ae", "dcae"])
def test_remat_changes_no_gradient(name):
    module = MODULES[name]
    params, images = tokenizers.random_params(module), tokenizers.random_images(module)

    def gradient(module):
        def loss(p):
            rngs = {"bits": jax.random.key(2)}
            return jnp.mean(module.apply({"params": p}, images, train=True, rngs=rngs)[0] ** 2)

        return flatten_dict(jax.jit(jax.grad(loss))(params))

    again = gradient(module.clone(remat=True))
    for path, leaf in gradient(module).items():
        np.testing.assert_allclose(leaf, again[path], rtol=1e-4, atol=1e-5, err_msg=str(path))
        assert path[-1] != "kernel" or np.abs(leaf).max() > 0, path


@pytest.mark.parametrize("name", ["binary_ae", "dcae bernoulli"])
def test_bits_are_drawn_in_training_and_rounded_otherwise(name):
    module = MODULES[name]
    params, images = tokenizers.random_params(module), tokenizers.random_images(module)
    probs = apply(module, params, images, method="probs")
    rounded = module.clone(deterministic=True)
    for bits in (
        apply(module, params, images, method="encode"),
        apply(rounded, params, images, train=True)[1]["bits"],
    ):
        np.testing.assert_array_equal(bits, probs > 0.5)

    def draw(key):
        return apply(module, params, images, train=True, rngs={"bits": key})[1]["bits"]

    # Neither encoder has batch norms, so probabilities are the same in training.
    drawn = jax.vmap(draw)(jax.random.split(jax.random.key(2), 400)).mean(0)
    assert np.abs(drawn - probs).max() < 5 * 0.5 / np.sqrt(400)


@pytest.mark.parametrize(
    "name", ["binary_ae", "binary_ae signed", "gfq_ae", "conv_ae bernoulli", "conv_ae sign"]
)
def test_gradients_pass_straight_through(name):
    """By hand: the gradient that reaches the bits goes on to the encoder unchanged."""
    module = MODULES[name]
    params, images = tokenizers.random_params(module), tokenizers.random_images(module)
    signs = name in ("gfq_ae", "conv_ae sign")
    weights = jax.random.normal(jax.random.key(3), images.shape)

    def loss(p):
        return jnp.sum(module.apply({"params": p}, images, train=False)[0] * weights)

    def soft_bits(p):
        if not signs:
            return module.apply({"params": p}, images, method="probs")
        gfq = name == "gfq_ae"
        plain = module if gfq else module.clone(quantizer="none")
        z = plain.apply({"params": p}, images, method="hidden" if gfq else "encode")
        return (z + 1) / 2  # a sign is 2 bit - 1

    def decode(p, bits):
        # decode() takes bools; floats in {0, 1} have a gradient.
        return jnp.sum(module.apply({"params": p}, bits, method="decode") * weights)

    bits = apply(module, params, images, method="encode").astype(jnp.float32)
    to_decoder, to_bits = jax.jit(jax.grad(decode, (0, 1)))(params, bits)
    to_encoder = jax.jit(lambda p, g: jax.vjp(soft_bits, p)[1](g)[0])(params, to_bits)
    expected = flatten_dict(jax.tree.map(jnp.add, to_decoder, to_encoder))
    for path, leaf in flatten_dict(jax.jit(jax.grad(loss))(params)).items():
        np.testing.assert_allclose(leaf, expected[path], rtol=2e-3, atol=2e-3, err_msg=str(path))
        assert path[-1] != "kernel" or np.abs(leaf).max() > 1e-6, path


@pytest.mark.parametrize("name", ["gfq_ae", "dcae"])
def test_bfloat16_is_close_and_float32_outside(name):
    module = MODULES[name]
    params = tokenizers.random_params(module)
    module = module.clone(image_size=32)  # in DC-AE 64 tokens, whose attention is by sums
    images = tokenizers.random_images(module)
    half = module.clone(dtype=jnp.bfloat16)
    codes = apply(module, params, images, method="encode")
    whole = apply(module, params, codes, method="decode")
    ours = apply(half, params, codes, method="decode")
    assert ours.dtype == jnp.float32
    assert apply(half, params, images, train=False)[1]["last_input"].dtype == jnp.bfloat16
    assert 0 < np.abs(whole - ours).max() < 0.1 * np.abs(whole).max()
    if module.bits:
        whole, ours = (apply(m, params, images, method="hidden") for m in (module, half))
    else:
        ours = apply(half, params, images, method="encode")
        whole = codes
    assert ours.dtype == jnp.float32
    assert 0 < np.abs(whole - ours).max() < 0.1 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("binary_ae", {"width": 48}, r"48 channels, its norm 32 groups .* multiple of 32"),
        ("bitvae", {"patch": 4}, "6 bits do not fill a patch of 4x4"),
        ("gfq_ae", {"groups": 3}, "8 bits do not split into 3 groups"),
        ("gfq_ae", {"width": 48}, "a width that is a multiple of 32, got 48"),
        ("gfq_ae", {"image_size": 2}, "at least 2x2 cells.*image_size 2 with 2 levels"),
        ("conv_ae", {"kernel": 4}, "conv_ae needs an odd kernel"),
        ("dcae", {"encoder_depths": (0, 4)}, r"encoder_depths \(0, 4\) does not have one entry"),
        ("dcae", {"decoder_norms": ("rms",)}, r"decoder_norms \('rms',\) does not have one entry"),
        ("dcae", {"decoder_blocks": "res"}, "decoder_blocks 'res' does not have one entry"),
        ("dcae", {"encoder_depths": (1, 0, 1)}, "blocks in each but the first"),
        ("dcae", {"encoder_widths": (32, 32, 48)}, "48 of a stage of 'attention' blocks is not a"),
        ("dcae", {"encoder_widths": (32, 96, 256)}, "96 and 256 channels needs a divisor of 384"),
        ("dcae", {"latent_channels": 7}, "latent_channels 7 must divide the last of encoder_width"),
        ("dcae", {"image_size": 10}, "image_size 10 is not a multiple of 4"),
        ("dcae", {"encoder_blocks": ("res", "conv", "res")}, "unknown block of encoder_blocks"),
        ("dcae", {"decoder_norms": ("rms", "rms", "bn2d")}, "unknown norm of decoder_norms 'bn2d'"),
        ("dcae", {"downsample": "stride"}, "unknown downsample 'stride'"),
        ("dcae", {"quantizer": "vq"}, r"unknown quantizer 'vq', have \['bernoulli', 'none'"),
        ("dcae", {"quantizer": "sign", "group_size": 3}, "8 bits .* groups of group_size 3"),
        (
            "dcae",
            {n: x[1:] for n, x in tokenizers.DCAE.items() if n.startswith("decoder")},
            "encoder_widths has 3 stages and decoder_widths 2",
        ),
    ],
)
def test_settings_that_make_no_model_are_named(family, fields, message):
    with pytest.raises(UserError, match=message) as error:
        build.param_shapes(make(family, getattr(tokenizers, family.upper()), **fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("bitvae", "images of 15x16 pixels do not fit a grid of 2 pixels"),
        ("conv_ae", "image_size 8 got images of 7x8"),
        ("dcae", "7x8 pixels do not divide into cells of 4x4"),
    ],
)
def test_images_of_a_wrong_size_are_named(name, message):
    module = MODULES[name]
    images = tokenizers.random_images(module)[:, 1:]
    with pytest.raises(UserError, match=message):
        module.apply({"params": tokenizers.random_params(module)}, images, method="encode")
