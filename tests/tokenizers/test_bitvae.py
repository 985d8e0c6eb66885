"""BitVAE: bits at many scales, their schedules, the training path, and its files."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from helpers import tokenizers
from helpers.tokenizers import BITVAE as SMALL
from helpers.tokenizers import apply
from PIL import Image

from bitgen import config
from bitgen.convert import bitvae
from bitgen.convert.directory import export_file, import_file
from bitgen.convert.rules import export_tensors
from bitgen.errors import UserError
from bitgen.hub import model_directory
from bitgen.modes import reconstruct, tokenize
from bitgen.tokenizers.bitvae import BitVAE
from bitgen.tokenizers.multiscale import MultiScale, area_downsample, linear_upsample, scales_of

SCHEDULES = json.loads((Path(__file__).parent / "bitvae_scale_schedules.json").read_text())


@pytest.fixture(scope="module")
def small():
    return tokenizers.case("bitvae", SMALL)


def quantized(quantizer, z, scales, key=None):
    return jax.jit(lambda z, key: quantizer(z, scales, key))(z, key)


def latents(seed=0, grid=(8, 8), k=6):
    return jax.random.normal(jax.random.key(seed), (2, *grid, k))


@pytest.mark.parametrize("schedule", ["dynamic", "original", "dense"])
def test_schedules_are_the_reference_s(schedule):
    assert len(SCHEDULES[schedule]) >= 3
    for name, sizes in SCHEDULES[schedule].items():
        h, w = map(int, name.split("x"))
        assert scales_of(schedule, (h, w)) == tuple((s[-2], s[-1]) for s in sizes)
    # Of the reference's code, and in no file: a wide grid in each of them.
    assert scales_of(schedule, (36, 64))[-2:] == ((32, 48), (36, 64))


def test_schedules_of_one_size_and_of_a_list():
    assert scales_of("same3", (5, 7)) == ((5, 7),) * 3
    assert scales_of([[1, 2], [4, 4]], (4, 4)) == ((1, 2), (4, 4))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ("dinamic", r"unknown schedule 'dinamic', have \['dense', 'dynamic', 'original', 'same1'"),
        ("same0", "unknown schedule 'same0'"),
        ("original", "'original' has no scales for a grid of 5x4 cells, only for 16x16 32x32"),
        (((1, 1), (4, 4)), r"\[1x1 4x4\] does not end in the grid of 5x4 cells"),
        ((), "does not end in the grid of 5x4 cells"),
        (((0, 1), (5, 4)), "at least one cell"),
        ((1, 2), "a name or a list of sizes"),
    ],
)
def test_wrong_schedules_are_one_clear_error(schedule, message):
    with pytest.raises(UserError, match=message):
        scales_of(schedule, (5, 4))


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 7), (9, 7), (13, 11)])
def test_resizing_is_torch_s(size):
    x = latents(grid=(9, 7), k=3)
    nchw = torch.from_numpy(np.array(x)).permute(0, 3, 1, 2)
    down = torch.nn.functional.interpolate(nchw, size=size, mode="area")
    np.testing.assert_allclose(area_downsample(x, size), down.permute(0, 2, 3, 1), atol=5e-6)
    up = torch.nn.functional.interpolate(nchw, size=size, mode="bilinear", align_corners=False)
    np.testing.assert_allclose(linear_upsample(x, size), up.permute(0, 2, 3, 1), atol=5e-6)


def test_bits_of_every_scale(small):
    module, params, images = small
    bits = apply(module, params, images, method="encode")
    assert module.grid == module.scales[-1] == (8, 8)
    assert module.bits_per_scale == tuple(x[0].size for x in bits)
    losses = apply(module, params, images, train=False)[1]["losses"]
    assert losses.keys() == {"entropy", "commitment"}


def test_each_scale_codes_what_the_coarser_ones_left(small):
    module, params, images = small
    left = apply(module, params, images, method="hidden")
    bits = apply(module, params, images, method="encode")
    total = jnp.zeros_like(left)
    for i, scale in enumerate(bits):
        np.testing.assert_array_equal(scale, area_downsample(left, scale.shape[1:3]) > 0)
        code = linear_upsample((scale * 2.0 - 1) / np.sqrt(6), (8, 8))
        left, total = left - code, total + code
        # The first scales alone, on the grid of the whole image.
        first = apply(module, params, bits[: i + 1], grid=(8, 8), method="codes")
        np.testing.assert_allclose(first, total, atol=1e-6)
    partial = apply(module, params, bits[:2], grid=module.grid, method="decode")
    whole = apply(module, params, bits, method="decode")
    assert partial.shape == whole.shape
    assert np.abs(partial - whole).max() > 1e-3


def test_bits_that_are_not_of_the_schedule_are_named(small):
    module, params, images = small
    bits = apply(module, params, images, method="encode")
    with pytest.raises(UserError, match="does not end in the grid of 2x3 cells"):
        apply(module, params, bits[:2], method="decode")
    for wrong in (bits[1:], bits[:1] + bits[2:], ()):
        with pytest.raises(UserError, match="not the first of the schedule"):
            apply(module, params, wrong, grid=(8, 8), method="decode")
    with pytest.raises(UserError, match="does not end in the grid of 4x8 cells"):
        apply(module, params, images[:, 8:], method="encode")


def test_images_that_are_not_square(small):
    _, params, _ = small
    module = BitVAE(**{**SMALL, "schedule": "dynamic"})
    images = jax.random.uniform(jax.random.key(1), (1, 42, 24, 3), minval=-1, maxval=1)
    bits = apply(module, params, images, method="encode")
    assert [x.shape[1:3] for x in bits] == [*scales_of("dynamic", (21, 12))]
    assert apply(module, params, bits, method="decode").shape == images.shape


def test_patches_are_torch_s_pixel_unshuffle(small):
    _, params, images = small
    cells = BitVAE(**{**SMALL, "schedule": ((2, 2), (4, 6), (8, 8))})
    tokens = BitVAE(**{**SMALL, "schedule": ((1, 1), (2, 3), (4, 4)), "bits": 24, "patch": 2})
    assert (tokens.stride, tokens.grid, tokens.code_channels) == (4, (4, 4), 6)
    plain = apply(cells, params, images, method="encode")
    patched = apply(tokens, params, images, method="encode")
    for a, b in zip(plain, patched, strict=True):
        a = torch.from_numpy(np.array(a)).permute(0, 3, 1, 2).float()
        a = torch.nn.functional.pixel_unshuffle(a, 2).permute(0, 2, 3, 1)
        np.testing.assert_array_equal(a > 0, b)
    np.testing.assert_array_equal(
        apply(cells, params, plain, method="decode"),
        apply(tokens, params, patched, method="decode"),
    )


def test_gradients_reach_the_encoder(small):
    module, params, images = small

    def losses(p):
        recon, aux = module.apply({"params": p}, images, train=True)
        return jnp.stack([jnp.mean(jnp.abs(recon - images)), *aux["losses"].values()])

    gradients = jax.jit(jax.jacrev(losses))(params)["encoder"]["conv_in"]["kernel"]
    assert len(gradients) == 3
    assert all(1e-6 < np.abs(gradient).max() < np.inf for gradient in gradients)


def test_gradient_is_straight_through_at_each_scale():
    """By hand for two scales: the codes' gradient goes to each residual's direction."""
    scales, weights, k = [(2, 2), (4, 4)], latents(5, (4, 4), 3), 3
    z = latents(4, (4, 4), k)

    def unit(x):
        return x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True))

    code = linear_upsample(jnp.sign(area_downsample(z, (2, 2))) / k**0.5, (4, 4))

    def soft(z, detached):
        first = linear_upsample(unit(area_downsample(z, (2, 2))), (4, 4))
        # The value of the code, with the gradient of the direction where it is not detached.
        through = code if detached else code + first - jax.lax.stop_gradient(first)
        return jnp.sum((first + unit(z - through)) * weights)

    for detached in (True, False):
        quantizer = MultiScale(detach_residual=detached)
        ours = jax.grad(lambda z, q=quantizer: jnp.sum(q(z, scales).codes * weights))
        by_hand = jax.grad(functools.partial(soft, detached=detached))
        np.testing.assert_allclose(jax.jit(ours)(z), jax.jit(by_hand)(z), atol=1e-4)


def test_stochastic_depth_drops_whole_scales():
    scales, z = [(1, 1), (2, 2), (4, 4), (8, 8)], latents()
    settings = {"drop_rate": 0.3, "keep_first": True, "keep_last": True}
    quantizer = MultiScale(**settings)
    run = jax.jit(jax.vmap(lambda key: quantizer(z, scales, key)))
    out = run(jax.random.split(jax.random.key(2), 400))

    # Every result is the sum of whole scales, each of what the ones in use left of z.
    @jax.jit
    def by_hand(use):
        left, total, losses = z, jnp.zeros_like(z), []
        for size, on in zip(scales, use, strict=True):
            one = quantizer.quantizer(area_downsample(left, size))
            losses.append(one.losses["commitment"])
            code = on * linear_upsample(one.codes, (8, 8))
            left, total = left - code, total + code
        return total, jnp.dot(jnp.stack(losses), use) / jnp.sum(use)

    shares = {}
    for use in [(1, a, b, 1) for a in (0, 1) for b in (0, 1)]:
        total, loss = by_hand(jnp.array(use, jnp.float32))
        same = np.abs(out.codes - total[None]).max((1, 2, 3, 4)) < 1e-5
        shares[use] = same.mean()
        np.testing.assert_allclose(out.losses["commitment"][same], loss, rtol=1e-4)
    assert sum(shares.values()) == 1
    for (_, a, b, _), share in shares.items():
        expected = (0.7 if a else 0.3) * (0.7 if b else 0.3)
        assert abs(share - expected) < 5 * np.sqrt(expected * (1 - expected) / 400)
    with pytest.raises(UserError, match="needs keep_first or keep_last"):
        MultiScale(drop_rate=0.1, keep_first=False)


def test_flips_are_of_the_first_scales_and_the_finer_ones_see_them():
    scales, z = [(2, 2), (8, 8), (8, 8)], latents()
    keys = jax.random.split(jax.random.key(3), 3)
    plain = quantized(MultiScale(), z, scales)
    kept = quantized(MultiScale(flip_prob=1.0, flip_scales=0), z, scales, keys[0])
    np.testing.assert_array_equal(kept.codes, plain.codes)
    flipped = quantized(MultiScale(flip_prob=1.0, flip_scales=1), z, scales, keys[1])
    coarse = linear_upsample(MultiScale().quantizer.codes(~plain.bits[0]), (8, 8))
    rest = quantized(MultiScale(), z - coarse, scales[1:])
    np.testing.assert_allclose(flipped.codes, coarse + rest.codes, atol=1e-6)
    # With a chance of 0.3, on 8 x 8 x 6 bits of two images.
    once = quantized(MultiScale(flip_prob=0.3), z, [(8, 8)], keys[2])
    changed = (once.codes > 0) != MultiScale().bits(z, [(8, 8)])[0]
    assert abs(changed.mean() - 0.3) < 5 * np.sqrt(0.3 * 0.7 / changed.size)


def test_decay_counts_fine_scales_less():
    scales, z = [(4, 4)] * 12, latents(grid=(4, 4))
    quantizer = MultiScale(decay=True)
    out = quantized(quantizer, z, scales)
    np.testing.assert_allclose(quantizer.codes(out.bits, (4, 4)), out.codes, atol=1e-6)
    zero = tuple(jnp.zeros_like(x) for x in out.bits)
    factors = [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1]
    np.testing.assert_allclose(quantizer.codes(zero, (4, 4)), -sum(factors) / 6**0.5, rtol=1e-5)


def test_training_is_random_only_where_settings_say_so(small):
    module, params, images = small
    noisy = module.clone(drop_rate=0.5, flip_prob=0.2, flip_scales=4)
    rngs = [{"bits": key} for key in jax.random.split(jax.random.key(7))]
    a, b = (apply(noisy, params, images, train=True, rngs=rng)[0] for rng in rngs)
    assert np.abs(a - b).max() > 1e-3
    # No rng is asked for.
    still = apply(noisy, params, images, train=False)[0]
    np.testing.assert_array_equal(still, apply(module, params, images, train=True)[0])


def write_file(path, levels=(True, True), extra=None, **fields):
    """A file as released, of random tensors -> the parameters and the tensors."""
    hparams = {**SMALL, "schedule": "dynamic", "image_size": 32, **fields}
    params = tokenizers.random_params(BitVAE(**hparams))
    tensors = dict(export_tensors(bitvae.table(hparams, *levels), params, {}, hparams, params))
    state = {n: torch.from_numpy(x) for n, x in {**tensors, **(extra or {})}.items()}
    torch.save({"vae": state}, path)
    return params, tensors


@pytest.mark.parametrize("levels", [(True, True), (False, False), (True, False)])
def test_files_of_all_spellings_there_and_back(tmp_path, levels):
    extra = {"image_disc.main.0.weight": np.ones((2, 2), np.float32)}
    params, tensors = write_file(tmp_path / "x.pth", levels, extra)
    assert ("encoder.down.0.block.0.conv1.conv.weight" in tensors) == levels[0]
    assert ("encoder.down.0.block.0.norm1.weight" in tensors) != levels[1]
    assert ("encoder.down.0.downsample.conv.weight" in tensors) != levels[0]
    imported = import_file(tmp_path / "x.pth", tmp_path / "model")
    assert [*imported.plan.ignored] == ["image_disc.main.0.weight"]
    assert imported.info["hparams"]["bits"] == 6
    loaded = model_directory.load(tmp_path / "model", "tokenizer").params
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    assert export_file(tmp_path / "model", tmp_path / "y.pth") == len(tensors)
    back = torch.load(tmp_path / "y.pth", weights_only=True)["vae"]
    assert back.keys() == tensors.keys()
    for name, x in tensors.items():
        assert back[name].numpy().tobytes() == x.tobytes(), name


def test_bits_of_a_number_have_their_places():
    hparams = {**SMALL, "bits": 64}
    masks = [e.make(hparams) for e in bitvae.table(hparams) if e.torch.endswith("lfq.mask")]
    assert len(masks) == 2
    for mask in masks:
        np.testing.assert_array_equal(mask, (2 ** torch.arange(63, -1, -1)).numpy())


def test_the_regularised_twin_is_told_by_its_name(tmp_path):
    write_file(tmp_path / "x.pth")
    with pytest.raises(UserError, match="this looks like a bitvae checkpoint: d6") as raised:
        import_file(tmp_path / "x.pth", tmp_path / "model", "bitvae_d32reg")
    assert "not bitvae_d32reg (d32reg)" in str(raised.value)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ({"ln_before_quant": True}, "ln_before_quant=True cannot be imported, only False"),
        ({"decoder_ch_mult": [1, 2, 4]}, "encoder_ch_mult and decoder_ch_mult differ"),
        ({"patch_size": 8}, "patch_size 8 with 5 levels cannot be imported, only 16"),
    ],
)
def test_settings_that_cannot_be_imported_are_named(reference, message):
    with pytest.raises(UserError, match=message):
        bitvae.hparams_from_reference({"codebook_dim": 16, **reference})


def test_modes_with_many_scales(small, tmp_path):
    _, params, _ = small
    fields = {**SMALL, "image_size": 8, "schedule": ((1, 1), (2, 2), (4, 4))}
    info = {"kind": "tokenizer", "family": "bitvae", "hparams": fields}
    model_directory.write(tmp_path / "model", info, params)
    c = config.base()
    c.tokenizer = str(tmp_path / "model")
    c.reconstruct.images = 16
    c.reconstruct.batch_size = 16
    reconstruct.run(c, tmp_path)
    result = json.loads((tmp_path / "reconstructions.json").read_text())
    assert result["bits_per_image"] == 6 * (1 + 4 + 16)
    assert result["bits_used"] == pytest.approx(1 - result["bits_dead"] / 6)
    assert 0 < result["bits_entropy"] <= 1
    picture = np.asarray(Image.open(tmp_path / "bits.png"))
    assert picture.shape == (3 * 220, 2 * 640, 3)  # a row a scale
    with pytest.raises(UserError, match="gives bits at 3 scales"):
        tokenize.run(c, tmp_path)
