"""BitDance's autoencoder: bits, gradients through them, noise, and its file's odd tensors."""

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import tokenizers
from helpers.tokenizers import GFQ_AE as SMALL
from helpers.tokenizers import apply

from bitgen import build
from bitgen.convert import gfq_ae
from bitgen.convert.directory import export_file, import_file
from bitgen.convert.rules import export_tensors, import_tensors, plan_import
from bitgen.errors import UserError
from bitgen.hub import model_directory
from bitgen.tokenizers.gfq_ae import AdaptiveGroupNorm, GFQAutoencoder

MANIFEST = Path(__file__).parents[1] / "manifests" / "bitdance_ae_d16c32.json.gz"


@pytest.fixture(scope="module")
def small():
    return tokenizers.case("gfq_ae", SMALL, 4)


@pytest.fixture(scope="module")
def noisy():
    return tokenizers.case("gfq_ae", {**SMALL, "noise_decoder": True}, 4)


def test_an_image_does_not_depend_on_its_batch(small):
    module, params, images = small

    def encode(images):
        return apply(module, params, images, method="encode")

    whole = encode(images)
    np.testing.assert_array_equal(whole, np.concatenate([encode(images[:2]), encode(images[2:])]))
    np.testing.assert_array_equal(whole[::-1], encode(images[::-1]))


def test_losses_are_the_quantisers(small):
    module, params, images = small
    hidden = apply(module, params, images, method="hidden")
    losses = apply(module, params, images, train=True)[1]["losses"]
    sample, batch = module.quantizer.entropies(hidden)
    assert losses.keys() == {"entropy", "commitment"}
    np.testing.assert_allclose(losses["entropy"], sample - batch, rtol=1e-4)
    np.testing.assert_allclose(
        losses["commitment"], np.mean((hidden - np.sign(hidden)) ** 2), rtol=1e-4
    )


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
    module, params, _ = noisy
    bits = jax.random.bernoulli(jax.random.key(2), 0.5, (2, *module.grid, 8))

    def decode(bits, *key):
        return np.asarray(apply(module, params, bits, *key, method="decode"))

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


def test_noise_decoder_draws_in_training(noisy):
    module, params, images = noisy

    def recon(seed):
        rngs = {"bits": jax.random.key(seed)}
        return apply(module, params, images, train=True, rngs=rngs)[0]

    np.testing.assert_array_equal(recon(1), recon(1))
    assert np.abs(recon(1) - recon(2)).max() > 1e-2


def random_tensors(hparams):
    """Random parameters and the PyTorch tensors that the table writes of them."""
    params = tokenizers.random_params(GFQAutoencoder(**hparams))
    return params, dict(export_tensors(gfq_ae.table(hparams), params, {}, hparams, params))


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
    imported, carried = import_tensors(gfq_ae.table(hparams), tensors, params)
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
    assert apply(model.module, model.params, images, method="encode").shape[-1] == 8
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
    others = {"in_channels": 1, "out_ch": 1, "gan_decoder": True, "double_z": False}
    found = gfq_ae.hparams_from_reference({**names, **others})
    sizes = {"channels": 1, "width": 64, "multipliers": (1, 2), "blocks": 3, "bits": 16}
    assert found == {**sizes, "groups": 1, "image_size": 256, "noise_decoder": True}
    with pytest.raises(UserError, match="in_channels 3 and out_ch 1 cannot be imported"):
        gfq_ae.hparams_from_reference({"in_channels": 3, "out_ch": 1})
    for shapes in ({}, {"encoder.conv_in.weight": (8, 3, 3, 3)}):
        assert gfq_ae.recognise(shapes) is None


def test_released_size():
    module = GFQAutoencoder()
    assert module.grid == (16, 16)
    shapes = build.param_shapes(module)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 460_294_179
