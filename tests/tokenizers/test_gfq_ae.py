"""BitDance's autoencoder: bits, gradients through them, noise, and its file's odd tensors."""

import functools
import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bitgen import build
from bitgen.convert import gfq_ae
from bitgen.convert.directory import export_file, import_file
from bitgen.convert.rules import export_tensors, import_tensors, plan_import
from bitgen.errors import UserError
from bitgen.hub import model_directory
from bitgen.tokenizers.gfq_ae import AdaptiveGroupNorm, GFQAutoencoder

SMALL = {
    "width": 32,
    "multipliers": (1, 2),
    "blocks": 1,
    "bits": 8,
    "groups": 2,
    "image_size": 16,
}
MANIFEST = Path(__file__).parents[1] / "manifests" / "bitdance_ae_d16c32.json.gz"


def init(module):
    return jax.jit(functools.partial(build.init_params, module))(jax.random.key(0))


@functools.cache
def compiled(module, method, options):
    apply = functools.partial(module.apply, method=method, **dict(options))
    return jax.jit(lambda params, args, rngs: apply({"params": params}, *args, rngs=rngs))


def run(module, params, *args, method=None, rngs=None, **options):
    """The module applied, compiled once for all tests."""
    return compiled(module, method, tuple(options.items()))(params, args, rngs)


@pytest.fixture(scope="module")
def small():
    module = GFQAutoencoder(**SMALL)
    params = init(module)
    images = jax.random.uniform(jax.random.key(1), (4, 16, 16, 3), minval=-1, maxval=1)
    return module, params, images


@pytest.fixture(scope="module")
def noisy():
    module = GFQAutoencoder(**SMALL, noise_decoder=True)
    return module, init(module)


def test_encode_takes_signs_and_decode_gives_images(small):
    module, params, images = small
    hidden = run(module, params, images, method="hidden")
    bits = run(module, params, images, method="encode")
    assert bits.dtype == bool
    assert bits.shape == (4, *module.grid, 8)
    np.testing.assert_array_equal(bits, hidden > 0)
    assert 0.1 < bits.mean() < 0.9
    decoded = run(module, params, bits, method="decode")
    assert decoded.shape == images.shape
    assert decoded.dtype == jnp.float32
    recon, aux = run(module, params, images, train=False)
    np.testing.assert_allclose(recon, decoded, atol=1e-5)
    np.testing.assert_array_equal(aux["bits"], bits)


def test_an_image_does_not_depend_on_its_batch(small):
    module, params, images = small

    def encode(images):
        return run(module, params, images, method="encode")

    whole = encode(images)
    np.testing.assert_array_equal(whole, np.concatenate([encode(images[:2]), encode(images[2:])]))
    np.testing.assert_array_equal(whole[::-1], encode(images[::-1]))


def test_losses_are_the_quantisers(small):
    module, params, images = small
    hidden = run(module, params, images, method="hidden")
    losses = run(module, params, images, train=True)[1]["losses"]
    sample, batch = module.quantizer.entropies(hidden)
    assert losses.keys() == {"entropy", "commitment"}
    np.testing.assert_allclose(losses["entropy"], sample - batch, rtol=1e-4)
    np.testing.assert_allclose(
        losses["commitment"], np.mean((hidden - np.sign(hidden)) ** 2), rtol=1e-4
    )


def test_gradient_reaches_the_encoder_straight_through(small):
    module, params, images = small
    weights = jax.random.normal(jax.random.key(3), images.shape)

    def decode(bits):
        # decode() takes bools; floats in {0, 1} reach the same path and have a gradient.
        return jnp.sum(run(module, params, bits, method="decode") * weights)

    def through(images):
        return jnp.sum(run(module, params, images, train=True)[0] * weights)

    # By hand: the gradient that reaches the codes goes on to the encoder's output as it is.
    bits = run(module, params, images, method="encode").astype(jnp.float32)
    to_codes = jax.jit(jax.grad(decode))(bits) / 2  # a code is 2 bit - 1

    def encode(images):
        return jnp.sum(run(module, params, images, method="hidden") * to_codes)

    expected = jax.jit(jax.grad(encode))(images)
    assert np.abs(expected).max() > 1e-3
    np.testing.assert_allclose(jax.jit(jax.grad(through))(images), expected, rtol=1e-3, atol=1e-4)


def test_last_input_is_what_makes_the_pixels(small):
    module, params, images = small
    recon, aux = run(module, params, images, train=True)
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
    ours = module.image_scale * (pixels + layer["bias"].reshape(1, 1, 1, -1))
    np.testing.assert_allclose(recon, ours, atol=1e-4)


def test_half_precision_and_remat_give_the_same_images_about(small):
    module, params, images = small
    bits = run(module, params, images, method="encode")
    want = run(module, params, bits, method="decode")
    half = module.clone(dtype=jnp.bfloat16, remat=True)
    hidden = run(module, params, images, method="hidden")
    ours = run(half, params, images, method="hidden")
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, hidden, atol=0.1)
    np.testing.assert_allclose(run(half, params, bits, method="decode"), want, atol=0.1)
    same = run(module.clone(remat=True), params, bits, method="decode")
    np.testing.assert_allclose(same, want, atol=1e-5)


def test_adaptive_group_norm_against_torch():
    rng = np.random.default_rng(0)
    x, style = (rng.standard_normal(s).astype(np.float32) for s in ((2, 4, 6, 64), (2, 3, 5, 7)))
    weights = [rng.standard_normal((64, 7)).astype(np.float32) for _ in range(2)]
    biases = [rng.standard_normal(64).astype(np.float32) for _ in range(2)]
    params = {
        name: {"kernel": w.T, "bias": b}
        for name, w, b in zip(("gamma", "beta"), weights, biases, strict=True)
    }
    ours = AdaptiveGroupNorm().apply({"params": params}, x, style)

    flat = torch.from_numpy(style).flatten(1, 2)
    statistics = ((flat.var(1) + 1e-6).sqrt(), flat.mean(1))
    scale, shift = (
        torch.nn.functional.linear(s, torch.from_numpy(w), torch.from_numpy(b))
        for s, w, b in zip(statistics, weights, biases, strict=True)
    )
    normed = torch.nn.functional.group_norm(torch.from_numpy(x).permute(0, 3, 1, 2), 32, eps=1e-6)
    want = scale[:, :, None, None] * normed + shift[:, :, None, None]
    np.testing.assert_allclose(ours, want.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_noise_decoder_follows_its_key_alone(noisy):
    module, params = noisy
    bits = jax.random.bernoulli(jax.random.key(2), 0.5, (2, *module.grid, 8))

    def decode(bits, *key):
        return np.asarray(run(module, params, bits, *key, method="decode"))

    a, again, b = (decode(bits, jax.random.key(seed)) for seed in (5, 5, 6))
    np.testing.assert_array_equal(a, again)
    assert np.abs(a - b).max() > 1e-2
    fixed = decode(bits)
    np.testing.assert_array_equal(fixed, decode(bits))
    np.testing.assert_allclose(fixed[1:], decode(bits[1:]), atol=1e-5)
    same = decode(jnp.broadcast_to(bits[:1], bits.shape))
    np.testing.assert_allclose(same[0], same[1], atol=1e-5)
    drawn = decode(jnp.broadcast_to(bits[:1], bits.shape), jax.random.key(5))
    assert np.abs(drawn[0] - drawn[1]).max() > 1e-2


def test_noise_decoder_draws_in_training(noisy, small):
    module, params = noisy
    images = small[2]

    def recon(seed):
        rngs = {"bits": jax.random.key(seed)}
        return run(module, params, images, train=True, rngs=rngs)[0]

    np.testing.assert_array_equal(recon(1), recon(1))
    assert np.abs(recon(1) - recon(2)).max() > 1e-2
    evaluated = run(module, params, images, train=False)[0]
    bits = run(module, params, images, method="encode")
    decoded = run(module, params, bits, method="decode")
    np.testing.assert_allclose(evaluated, decoded, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"groups": 3}, "8 bits do not split into 3 groups"),
        ({"width": 48}, "a width that is a multiple of 32, got 48"),
        ({"image_size": 2}, "at least 2x2 cells.*image_size 2 with 2 levels"),
    ],
)
def test_settings_that_make_no_model_are_named(fields, message):
    with pytest.raises(UserError, match=message):
        build.param_shapes(GFQAutoencoder(**{**SMALL, **fields}))


def random_tensors(hparams):
    """Random parameters and the PyTorch tensors that the table writes of them."""
    target = build.param_shapes(GFQAutoencoder(**hparams))
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), target)
    return params, dict(export_tensors(gfq_ae.table(hparams), params, {}, hparams, target))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"noise_decoder": True},
        {"multipliers": (1, 1, 2), "blocks": 2},
        {"multipliers": (2, 1)},
        {"multipliers": (2,)},
        {"bits": 20, "groups": 4, "channels": 1},
    ],
)
def test_round_trip_and_recognition(changes):
    hparams = {"channels": 3, "noise_decoder": False, **SMALL, **changes}
    params, tensors = random_tensors(hparams)
    target = build.param_shapes(GFQAutoencoder(**hparams))
    imported, carried = import_tensors(gfq_ae.table(hparams), tensors, target)
    assert not carried
    jax.tree.map(np.testing.assert_array_equal, imported, params)
    # Neither the size of the images nor the groups are in the shapes.
    assumed = {"image_size": 256, "groups": 4 if hparams["bits"] == 20 else 1}
    shapes = {name: x.shape for name, x in tensors.items()}
    assert gfq_ae.recognise(shapes) == {**hparams, **assumed}


def test_a_file_and_back_without_what_only_training_used(tmp_path):
    _, tensors = random_tensors({**SMALL, "bits": 8})
    state = {name: torch.from_numpy(np.array(x)) for name, x in tensors.items()}
    extra = {"loss.discriminator.main.0.weight": 2, "model_ema.encoderconv_inweight": 3}
    odd = {name: torch.ones(n) for name, n in extra.items()}
    torch.save({"state_dict": {**state, **odd}, "epoch": 3}, tmp_path / "ae.pt")
    done = import_file(tmp_path / "ae.pt", tmp_path / "model")
    assert done.info["family"] == "gfq_ae"
    assert done.plan.ignored.keys() == extra.keys()
    model = model_directory.load(tmp_path / "model", "tokenizer")
    images = np.zeros((1, 16, 16, 3), np.float32)
    assert run(model.module, model.params, images, method="encode").shape[-1] == 8
    export_file(tmp_path / "model", tmp_path / "back.pt")
    written = torch.load(tmp_path / "back.pt")["state_dict"]
    assert written.keys() == state.keys()
    assert all(torch.equal(written[name], value) for name, value in state.items())


def test_faults_of_the_released_file_are_named():
    spec = json.loads(gzip.decompress(MANIFEST.read_bytes()))
    hparams = gfq_ae.hparams_from_reference(spec["hparams"])
    shapes = {name: tuple(shape) for name, (shape, _) in spec["tensors"].items()}
    target = build.param_shapes(GFQAutoencoder(**hparams))
    table = gfq_ae.table(hparams)
    for fault in list(shapes)[::5]:
        without = {name: shape for name, shape in shapes.items() if name != fault}
        assert gfq_ae.recognise(without) == hparams, fault
        with pytest.raises(UserError, match=r"missing tensors: " + fault.replace(".", r"\.")):
            plan_import(table, without, target)
    for name in ("quantize.codebook", "discriminator.main.0.weight", "encoder.conv_in.bias"):
        with pytest.raises(UserError, match=r"1 unknown tensors: " + name.replace(".", r"\.")):
            plan_import(table, {**shapes, name: (2,)}, target)


def test_settings_of_the_original():
    names = {"z_channels": 16, "ch": 64, "ch_mult": [1, 2], "num_res_blocks": 3}
    found = gfq_ae.hparams_from_reference(
        {**names, "in_channels": 1, "out_ch": 1, "gan_decoder": True, "double_z": False}
    )
    assert found == {
        "channels": 1,
        "width": 64,
        "multipliers": (1, 2),
        "blocks": 3,
        "bits": 16,
        "groups": 1,
        "image_size": 256,
        "noise_decoder": True,
    }
    with pytest.raises(UserError, match="in_channels 3 and out_ch 1 cannot be imported"):
        gfq_ae.hparams_from_reference({"in_channels": 3, "out_ch": 1})
    for shapes in ({}, {"encoder.conv_in.weight": (8, 3, 3, 3)}):
        assert gfq_ae.recognise(shapes) is None


def test_released_size():
    module = GFQAutoencoder()
    assert module.grid == (16, 16)
    shapes = build.param_shapes(module)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 460_294_179
