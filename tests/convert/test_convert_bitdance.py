"""BitDance's files: both sets of weights, the tokenizer inside, and the way back."""

import pytest
import torch
from helpers.checkpoint_files import as_torch, random_export

from bitgen.convert.__main__ import main
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


def tensors_of(hparams, seed=0):
    """The tensors of a BitDance and of the tokenizer in its file."""
    _, vae = random_export("gfq_ae", TOKENIZER, 9)
    _, tensors = random_export("bitdance", hparams, seed)
    return {**tensors, **{f"vae.{name}": value for name, value in vae.items()}}


@pytest.mark.parametrize("together", [1, 4])
@pytest.mark.parametrize("weights", ["ema", "model"])
def test_there_and_back_with_the_tokenizer_inside(tmp_path, together, weights):
    hparams = {**GENERATOR, "together": together}
    sets = {name: tensors_of(hparams, seed) for seed, name in enumerate(("ema", "model"))}
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
    tensors = tensors_of(GENERATOR)
    del tensors["vae.decoder.conv_out.bias"]
    torch.save({"ema": as_torch(tensors)}, tmp_path / "x.pt")
    assert main([str(tmp_path / "x.pt"), str(tmp_path / "m")]) == 2
    said = capsys.readouterr().err
    assert "this looks like a bitdance checkpoint: d6, 2 layers of width 64" in said
    assert "missing tensors: vae.decoder.conv_out.bias" in said


def test_one_that_was_trained_here_takes_its_tokenizer_along(tmp_path, capsys):
    for kind, family, hparams, seed in (
        ("generator", "bitdance", GENERATOR, 0),
        ("tokenizer", "gfq_ae", TOKENIZER, 9),
    ):
        info = {"kind": kind, "family": family, "hparams": hparams, "origin": {}}
        model_directory.write(tmp_path / family, info, random_export(family, hparams, seed)[0])
    command = ["--to-torch", str(tmp_path / "bitdance"), str(tmp_path / "x.pt")]
    assert main([*command, f"--tokenizer={tmp_path / 'gfq_ae'}"]) == 0
    written = torch.load(tmp_path / "x.pt", weights_only=True)["ema"]
    assert {n: v.numpy().tobytes() for n, v in written.items()} == {
        n: v.tobytes() for n, v in tensors_of(GENERATOR).items()
    }
    assert main([*command, f"--tokenizer={tmp_path / 'bitdance'}"]) == 2
    assert "only the file of a bitdance trained here takes a tokenizer" in capsys.readouterr().err
