"""The families' tables: every released file at its real size, and small round trips."""

import functools
import json

import jax
import numpy as np
import pytest
import torch
from helpers.checkpoint_files import (
    BIGR,
    BINARY_AE,
    MANIFESTS,
    assert_same_trees,
    manifest,
    random_export,
    random_like,
    target_of,
)

from bitgen.convert import bigr, binary_ae, patchgan
from bitgen.convert.directory import FAMILIES, find_wrapping
from bitgen.convert.rules import export_tensors, import_tensors, plan_import
from bitgen.errors import UserError
from bitgen.losses.adversarial import PatchDiscriminator

RELEASED = sorted(path.name.removesuffix(".json.gz") for path in MANIFESTS.glob("*.json.gz"))
ONE_OF_EACH = ["bigr_bae_d24", "bigr_L_d24", "bitdance_B_4x", "bitvae_d16", "dc_ae_f32c32_in"]
SMALL_BAE = {
    **{**BINARY_AE, "blocks": 2, "bits": 12, "embed_dim": 64},
    **{"decoder_multiplier": 1.5, "norm_first": False},
}
SMALL_BIGR = {**BIGR, "width": 48, "heads": 2, "mlp_multiple": 32}


@functools.cache
def released(name):
    """The family's module, settings in our words, shapes of the file and shapes of our tree."""
    family, hparams, shapes = manifest(name)
    return FAMILIES[family].convert, hparams, shapes, target_of(family, hparams)


def discriminator_export(hparams, size, seed=0):
    """As `random_export`, and the shapes of our tree."""
    gan = PatchDiscriminator(**hparams)
    target = jax.eval_shape(lambda: gan.init(jax.random.key(0), np.zeros((1, size, size, 3), "f4")))
    params = random_like(target, seed)
    tensors = dict(export_tensors(patchgan.table(hparams), params, {}, hparams, target))
    return params, tensors, target


@pytest.mark.parametrize("name", RELEASED)
def test_every_released_tensor_and_every_leaf_is_used_once(name):
    family, hparams, shapes, target = released(name)
    table = family.table(hparams, **find_wrapping(family, shapes))
    plan = plan_import(table, shapes, target)
    assert len(plan.leaves) == len(jax.tree.leaves(target))
    fills = {fill.torch for fill in plan.fills}
    constants = {n for n in shapes if n.startswith("diffusion_processor.scheduler.")}
    constants |= {n for n in shapes if n.endswith("lfq.mask")}
    # The groups do not overlap and leave nothing out.
    groups = [fills, plan.aliases, plan.carried, constants]
    assert sorted(n for group in groups for n in group) == sorted(shapes)
    assert not plan.ignored


@pytest.mark.parametrize("name", RELEASED)
def test_export_writes_exactly_the_released_names_and_shapes(name):
    family, hparams, shapes, target = released(name)
    table = family.table(hparams, **find_wrapping(family, shapes))
    # Arrays of one element in memory: export copies one tensor at a time.
    params = jax.tree.map(lambda x: np.broadcast_to(np.float32(0), x.shape), target)
    carried = {
        n: np.broadcast_to(np.float32(0), s)
        for n, s in shapes.items()
        if n.startswith(("disc.", "vae."))
    }
    written = {n: x.shape for n, x in export_tensors(table, params, carried, hparams, target)}
    assert written == shapes


@pytest.mark.parametrize("name", RELEASED)
def test_sizes_are_recognised_from_the_file_alone(name):
    family, hparams, shapes, _ = released(name)
    assert family.recognise(shapes) == hparams
    other = bigr if family is binary_ae else binary_ae
    assert other.recognise(shapes) is None


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_one_fault_does_not_hide_the_sizes_and_is_named(name):
    family, hparams, shapes, target = released(name)
    layout = find_wrapping(family, shapes)
    for fault in list(shapes)[::5]:
        without = {n: s for n, s in shapes.items() if n != fault}
        assert family.recognise(without) == hparams, fault
        assert find_wrapping(family, without) == layout, fault
        if fault.startswith("diffusion_processor.scheduler."):
            continue  # may be left out
        with pytest.raises(UserError, match=r"missing tensors: " + fault.replace(".", r"\.")):
            plan_import(family.table(hparams, **layout), without, target)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_a_misshaped_or_unknown_tensor_is_named(name):
    family, hparams, shapes, target = released(name)
    table = family.table(hparams, **find_wrapping(family, shapes))
    for fault, shape in list(shapes.items())[::5]:
        with pytest.raises(UserError, match="misshaped tensors") as raised:
            plan_import(table, {**shapes, fault: (*shape, 2)}, target)
        assert fault in str(raised.value)
    with pytest.raises(UserError, match=r"1 unknown tensors: encoder\.extra"):
        plan_import(table, {**shapes, "encoder.extra": (2,)}, target)


def test_binary_ae_round_trip_with_its_discriminator():
    target, gan_hparams = target_of("binary_ae", SMALL_BAE), {"width": 8, "layers": 2}
    params, tensors = random_export("binary_ae", SMALL_BAE)
    gan_params, gan_tensors, gan_target = discriminator_export(gan_hparams, 32, 1)
    unused = "ae.generator.logsigma.0.weight"
    # Not the default, so that it must come from the file.
    tensors[unused] = np.full_like(tensors[unused], 3)
    file = {**tensors, **gan_tensors, "perceptual.net.slice1.0.weight": np.ones((2, 2))}
    shapes = {n: x.shape for n, x in file.items()}
    layout = binary_ae.wrapping(shapes)
    assert layout == {"prefix": "ae.", "discriminator": gan_hparams}
    table = binary_ae.table(SMALL_BAE, **layout)
    imported, carried = import_tensors(table, file, target)
    assert_same_trees(imported, params)
    written = dict(export_tensors(table, imported, carried, SMALL_BAE, target))
    del file["perceptual.net.slice1.0.weight"]
    assert_same_trees(written, file)

    aside = {n: x for n, x in carried.items() if n.startswith("disc.")}
    imported, counters = import_tensors(patchgan.table(gan_hparams), aside, gan_target)
    assert_same_trees(imported, gan_params)
    assert counters.keys() == {"disc.main.3.num_batches_tracked", "disc.main.6.num_batches_tracked"}


@pytest.mark.parametrize("prefix", ["", "module.ae."])
def test_binary_ae_under_other_prefixes(prefix):
    _, tensors = random_export("binary_ae", SMALL_BAE, prefix=prefix)
    shapes = {n: x.shape for n, x in tensors.items()}
    assert all(n.startswith(prefix) and not n.startswith("ae.") for n in shapes)
    assert binary_ae.wrapping(shapes) == {"prefix": prefix, "discriminator": None}
    defaults = {"channels": 3, "deterministic": False, "signed": False}
    assert binary_ae.recognise(shapes) == {**defaults, **SMALL_BAE}


def test_binary_ae_settings_read_from_json_work_as_lists():
    hparams = json.loads(json.dumps(SMALL_BAE))
    assert binary_ae.table(hparams)[:100:9] == binary_ae.table(SMALL_BAE)[:100:9]


@pytest.mark.parametrize("multiplier", [1.0, 1.5, 3.0, 7 / 3, 1 / 3])
def test_decoder_multiplier_is_recognised_up_to_what_it_does(multiplier):
    hparams = {**SMALL_BAE, "blocks": 3, "decoder_multiplier": multiplier}
    _, tensors = random_export("binary_ae", hparams)
    shapes = {n: x.shape for n, x in tensors.items()}
    found = binary_ae.recognise(shapes)
    assert found is not None
    assert int(3 * found["decoder_multiplier"]) == int(3 * multiplier)
    plan_import(binary_ae.table(found), shapes, target_of("binary_ae", hparams))


def test_decoder_multiplier_survives_rounding():
    assert int(11 * (15 / 11)) == 14
    assert int(11 * binary_ae._multiplier(11, 15)) == 15


@pytest.mark.parametrize("adaln", [True, False])
def test_bigr_round_trip(adaln):
    hparams = {**SMALL_BIGR, "adaln": adaln}
    target, table = target_of("bigr", hparams), bigr.table(hparams)
    params, tensors = random_export("bigr", hparams)
    assert ("adaLN.1.weight" in tensors) == ("layers.2.ada_gss" in tensors) == adaln
    imported, carried = import_tensors(table, tensors, target)
    assert not carried
    assert_same_trees(imported, params)
    assert_same_trees(dict(export_tensors(table, imported, {}, hparams, target)), tensors)
    found = bigr.recognise({n: x.shape for n, x in tensors.items()})
    assert found is not None
    # The number of heads is that of the released sizes, and a coarser multiple does as well.
    del found["heads"], found["mlp_multiple"]
    assert {n: found[n] for n in hparams if n in found} == {
        n: v for n, v in hparams.items() if n in found
    }


def test_bigr_attention_kernels_split_as_the_reference_splits():
    params, tensors = random_export("bigr", SMALL_BIGR)
    x = np.random.default_rng(5).standard_normal((7, 48)).astype(np.float32)
    for i in range(3):
        qkv = torch.from_numpy(x) @ torch.from_numpy(tensors[f"layers.{i}.attention.wqkv.weight"]).T
        kernel = params["layers"]["attention"]["qkv"]["kernel"][i]
        ours = np.einsum("nd,dshc->snhc", x, kernel)
        for part, theirs in zip(ours, qkv.split(48, dim=-1), strict=True):
            np.testing.assert_allclose(part, theirs.view(7, 2, 24).numpy(), rtol=1e-5, atol=1e-5)
        out = torch.from_numpy(x) @ torch.from_numpy(tensors[f"layers.{i}.attention.wo.weight"]).T
        kernel = params["layers"]["attention"]["out"]["kernel"][i]
        ours = np.einsum("nhc,hcd->nd", x.reshape(7, 2, 24), kernel)
        np.testing.assert_allclose(ours, out.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("layers.1.feed_forward.w1.weight", "layers/mlp/gate/kernel"),
        ("layers.1.feed_forward.w3.weight", "layers/mlp/up/kernel"),
        ("layers.1.attention_norm.weight", "layers/attention_norm/scale"),
        ("layers.1.ffn_norm.weight", "layers/mlp_norm/scale"),
        ("denoise_mlp.t_embedder.mlp.2.bias", "denoiser/time_out/bias"),
        ("denoise_mlp.x_embedder.bias", "denoiser/bits_in/bias"),
        ("denoise_mlp.c_embedder.bias", "denoiser/cond_in/bias"),
        ("denoise_mlp.blocks.1.mlp.0.weight", "denoiser/blocks_1/mlp_in/kernel"),
        ("denoise_mlp.blocks.1.mlp.2.weight", "denoiser/blocks_1/mlp_out/kernel"),
    ],
)
def test_bigr_tensors_that_shapes_cannot_tell_apart(name, ours):
    target, (_, tensors) = target_of("bigr", SMALL_BIGR), random_export("bigr", SMALL_BIGR)
    plan = plan_import(bigr.table(SMALL_BIGR), {n: x.shape for n, x in tensors.items()}, target)
    (fill,) = [fill for fill in plan.fills if fill.torch == name]
    assert fill.path == ours
    assert fill.index == (1 if name.startswith("layers.1.") else None)


def test_bigr_noise_schedule_is_linear_and_ends_in_coins():
    schedule = bigr.noise_schedule(64)
    t = np.arange(65) / 64
    np.testing.assert_allclose(schedule["k_final"], 1 - t, atol=1e-6)
    np.testing.assert_allclose(schedule["b_final"], t / 2, atol=1e-6)
    np.testing.assert_allclose(schedule["cumbeta"], schedule["k_final"], atol=1e-6)
    beta = torch.from_numpy(schedule["beta"])
    assert schedule["cumbeta"].tobytes() == torch.cumprod(beta, 0).numpy().tobytes()
    assert {x.dtype for x in schedule.values()} == {np.dtype(np.float32)}


def test_defaults_of_the_reference_are_kept_where_ours_differ():
    assert binary_ae.hparams_from_reference({})["norm_first"] is False
    found = bigr.hparams_from_reference({"block_size": 9})
    assert (found["adaln"], found["predict_flip"], found["grid"]) == (False, False, (3, 3))


def test_settings_that_cannot_be_imported_are_named():
    with pytest.raises(UserError, match="quantizer 'gumbel' cannot be imported"):
        binary_ae.hparams_from_reference({"quantizer": "gumbel"})
    with pytest.raises(UserError, match="block_size 10 must be a square"):
        bigr.hparams_from_reference({"block_size": 10})


def test_other_files_are_not_recognised():
    for shapes in ({}, {"encoder.conv_in.weight": (8, 3, 3, 3)}, {"layers.0.w": (2,)}):
        assert binary_ae.recognise(shapes) is None
        assert bigr.recognise(shapes) is None
        assert patchgan.recognise(shapes) is None


def test_discriminator_of_the_released_files():
    hparams = {"width": 64, "layers": 3}
    shapes = released("bigr_bae_d24")[2]
    shapes = {n: s for n, s in shapes.items() if n.startswith("disc.")}
    assert patchgan.recognise(shapes) == hparams
    for last in ("disc.main.11.weight", "disc.main.11.bias"):
        del shapes[last]
        assert patchgan.recognise(shapes) == hparams


@pytest.mark.parametrize("layers", [1, 3, 5])
def test_discriminator_tensors_have_the_same_shapes_imported_and_kept_aside(layers):
    hparams = {"width": 4, "layers": layers}
    _, tensors, _ = discriminator_export(hparams, 128)
    shapes = {n: x.shape for n, x in tensors.items()}
    assert {entry.torch: entry.shape for entry in patchgan.carried(hparams)} == shapes
    assert patchgan.recognise(shapes) == hparams
