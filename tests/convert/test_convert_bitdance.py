"""BitDance's files: both sets of weights, the tokenizer inside, and the way back."""

import jax
import numpy as np
import pytest
import torch
from helpers.checkpoint_files import as_torch

from bitgen import build
from bitgen.convert import bitdance, gfq_ae
from bitgen.convert.__main__ import main
from bitgen.convert.rules import export_tensors
from bitgen.hub import model_directory

TOKENIZER = {"width": 32, "multipliers": (1, 2), "blocks": 1, "bits": 6, "groups": 1}
GENERATOR = {
    "width": 64,
    "layers": 2,
    "heads": 1,
    "bits": 6,
    "grid": (4, 4),
    "num_classes": 3,
    "class_tokens": 2,
    "head_width": 64,
    "head_layers": 2,
}


def params_of(kind, family, hparams, seed):
    rng = np.random.default_rng(seed)
    target = build.param_shapes(build.make_module(kind, family, hparams))
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(np.float32), target), target


def tensors_of(table, kind, family, hparams, seed):
    params, target = params_of(kind, family, hparams, seed)
    return dict(export_tensors(table, params, {}, hparams, target))


def vae_tensors(seed=9):
    tensors = tensors_of(gfq_ae.table(TOKENIZER), "tokenizer", "gfq_ae", TOKENIZER, seed)
    return {f"vae.{name}": value for name, value in tensors.items()}


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_there_and_back_with_the_tokenizer_inside(tmp_path, together, weights):
    hparams = {**GENERATOR, "together": together}
    table = bitdance.table(hparams)
    sets = {
        name: {**tensors_of(table, "generator", "bitdance", hparams, seed), **vae_tensors()}
        for seed, name in enumerate(("ema", "model"))
    }
    torch.save({name: as_torch(s) for name, s in sets.items()}, tmp_path / "BitDance.pt")
    assert main([str(tmp_path / "BitDance.pt"), str(tmp_path / "m"), f"--weights={weights}"]) == 0
    info = model_directory.read_info(tmp_path / "m")
    assert (info["family"], info["hparams"]["together"]) == ("bitdance", together)
    assert main(["--to-torch", str(tmp_path / "m"), str(tmp_path / "back.pt")]) == 0
    back = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    assert sorted(back) == sorted(sets[weights])
    for name, value in sets[weights].items():
        assert back[name].numpy().tobytes() == value.tobytes(), name


def test_a_tensor_of_the_tokenizer_inside_that_is_missing_is_named(tmp_path, capsys):
    tensors = tensors_of(bitdance.table(GENERATOR), "generator", "bitdance", GENERATOR, 0)
    tensors |= vae_tensors()
    del tensors["vae.decoder.conv_out.bias"]
    torch.save({"ema": as_torch(tensors)}, tmp_path / "x.pt")
    assert main([str(tmp_path / "x.pt"), str(tmp_path / "m")]) == 2
    said = capsys.readouterr().err
    assert "this looks like a bitdance checkpoint: d6, 2 layers of width 64" in said
    assert "missing tensors: vae.decoder.conv_out.bias" in said


def test_one_that_was_trained_here_takes_its_tokenizer_along(tmp_path, capsys):
    info = {"origin": {}}
    for kind, family, hparams, seed in (
        ("generator", "bitdance", GENERATOR, 0),
        ("tokenizer", "gfq_ae", TOKENIZER, 9),
    ):
        params, _ = params_of(kind, family, hparams, seed)
        named = {"kind": kind, "family": family, "hparams": hparams, **info}
        model_directory.write(tmp_path / family, named, params)
    command = ["--to-torch", str(tmp_path / "bitdance"), str(tmp_path / "x.pt")]
    assert main([*command, f"--tokenizer={tmp_path / 'gfq_ae'}"]) == 0
    written = torch.load(tmp_path / "x.pt", weights_only=True)["ema"]
    expected = tensors_of(bitdance.table(GENERATOR), "generator", "bitdance", GENERATOR, 0)
    expected |= vae_tensors()
    assert {n: v.numpy().tobytes() for n, v in written.items()} == {
        n: v.tobytes() for n, v in expected.items()
    }
    assert main([*command, f"--tokenizer={tmp_path / 'bitdance'}"]) == 2
    assert "only the file of a bitdance trained here takes a tokenizer" in capsys.readouterr().err
