"""`python -m bitgen.convert`: files to model directories and back, and what damaged ones say."""

import errno
import json
import logging
import os

import absl.logging
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from helpers.checkpoint_files import (
    BIGR,
    BINARY_AE,
    DISCRIMINATOR,
    as_torch,
    assert_same_trees,
    bigr_tensors,
    binary_ae_tensors,
    random_like,
    save_bigr,
    save_binary_ae,
    target_of,
)
from safetensors.numpy import save_file

from bitgen.convert import files
from bitgen.convert.__main__ import main
from bitgen.convert.directory import FAMILIES, export_file, import_file
from bitgen.convert.rules import import_tensors
from bitgen.errors import UserError
from bitgen.hub import model_directory, zoo


@pytest.fixture(autouse=True)
def _logging_as_before():
    """The command silences libraries."""
    levels = {name: logging.getLogger(name).level for name in ("absl", "orbax", "jax", "grain")}
    verbosity = absl.logging.get_verbosity()
    yield
    absl.logging.set_verbosity(verbosity)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def run(*argv):
    return main([str(a) for a in argv])


def assert_same_state(state, tensors):
    assert set(state) == set(tensors)
    for name, tensor in state.items():
        assert tensor.numpy().dtype == tensors[name].dtype, name
        assert tensor.numpy().tobytes() == tensors[name].tobytes(), name


def expected_params(family, hparams, tensors, **layout):
    table = FAMILIES[family].convert.table(hparams, **layout)
    return import_tensors(table, tensors, target_of(family, hparams))


def test_bigr_there_and_back_bit_for_bit(tmp_path, capsys):
    tensors = save_bigr(tmp_path / "some.pt")
    assert run(tmp_path / "some.pt", tmp_path / "new" / "model") == 0
    assert "bigr generator, d5, 3 layers of width 64" in capsys.readouterr().err
    model = model_directory.load(tmp_path / "new" / "model", "generator")
    params, _ = expected_params("bigr", BIGR, tensors)
    assert_same_trees(model.params, params)
    assert model.info["digest"] == model_directory.digest(params)
    assert model.info["origin"] == {
        "file": "some.pt",
        "bytes": (tmp_path / "some.pt").stat().st_size,
        "weights": "ema",
        "zoo": None,
        "dtype": "float32",
    }
    assert {name: model.info["hparams"][name] for name in ("width", "bits", "diffusion_steps")} == {
        "width": 64,
        "bits": 5,
        "diffusion_steps": 40,
    }
    assert sorted(os.listdir(tmp_path / "new" / "model")) == ["model.json", "params"]

    assert run("--to-torch", tmp_path / "new" / "model", tmp_path / "back.pt") == 0
    assert f"{len(tensors)} tensors" in capsys.readouterr().err
    state = torch.load(tmp_path / "back.pt", weights_only=True)
    assert list(state) == ["ema"]
    assert_same_state(state["ema"], tensors)
    first = state["ema"]["denoise_mlp.x_embedder.weight"]
    second = state["ema"]["diffusion_processor._denoise_fn.x_embedder.weight"]
    assert first.data_ptr() == second.data_ptr()
    assert sorted(os.listdir(tmp_path)) == ["back.pt", "new", "some.pt"]


def test_binary_ae_goes_along_with_its_discriminator(tmp_path, capsys):
    tensors = save_binary_ae(tmp_path / "binaryae_ema_1.th")
    assert run(tmp_path / "binaryae_ema_1.th", tmp_path / "model") == 0
    said = capsys.readouterr().err
    assert "binary_ae tokenizer, d6, 32 px" in said
    assert "1 ignored: VGG16 of the perceptual loss" in said
    model = model_directory.load(tmp_path / "model", "tokenizer")
    layout = {"prefix": "ae.", "discriminator": DISCRIMINATOR}
    params, aside = expected_params("binary_ae", BINARY_AE, tensors, **layout)
    assert_same_trees(model.params, params)
    assert model.info["wrapping"] == layout
    assert model.info["origin"]["weights"] is None
    carried = model_directory.load_carried(tmp_path / "model")
    assert_same_trees(carried, aside)
    assert carried["ae.generator.logsigma.0.bias"][0] == 3

    assert run("--to-torch", tmp_path / "model", tmp_path / "back.th") == 0
    del tensors["perceptual.net.slice1.0.weight"]
    assert_same_state(torch.load(tmp_path / "back.th", weights_only=True), tensors)


def test_every_kind_of_file_gives_the_same_model(tmp_path):
    tensors = bigr_tensors()
    state = as_torch(tensors)
    torch.save(state, tmp_path / "bare.pth")
    torch.save({"model": as_torch(bigr_tensors(1)), "ema": state}, tmp_path / "both.pt")
    torch.save({"ema": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {f"module.{n}": x for n, x in state.items()}}, tmp_path / "ddp.pt")
    save_file({name: x.copy() for name, x in tensors.items()}, tmp_path / "x.safetensors")
    digests = {
        name: import_file(tmp_path / name, tmp_path / f"{name}.model").info["digest"]
        for name in ("bare.pth", "both.pt", "old.pt", "ddp.pt", "x.safetensors")
    }
    assert len(set(digests.values())) == 1
    other = import_file(tmp_path / "both.pt", tmp_path / "other", weights="model")
    assert other.info["digest"] not in digests.values()
    assert other.info["origin"]["weights"] == "model"


def test_bfloat16_halves_the_model_and_loads_as_float32(tmp_path):
    tensors = save_binary_ae(tmp_path / "x.th")
    imported = import_file(tmp_path / "x.th", tmp_path / "model", dtype="bfloat16")
    layout = {"prefix": "ae.", "discriminator": DISCRIMINATOR}
    params, aside = expected_params("binary_ae", BINARY_AE, tensors, **layout)
    rounded = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params)
    stored = jax.tree.map(np.asarray, model_directory.open_params(tmp_path / "model"))
    assert_same_trees(stored, rounded)
    assert imported.info["digest"] == model_directory.digest(rounded)
    model = model_directory.load(tmp_path / "model", "tokenizer")
    assert_same_trees(model.params, jax.tree.map(lambda x: x.astype(np.float32), rounded))
    assert_same_trees(model_directory.load_carried(tmp_path / "model"), aside)
    export_file(tmp_path / "model", tmp_path / "back.pt")
    state = torch.load(tmp_path / "back.pt", weights_only=True)
    assert state["ae.quantize.embed.weight"].dtype == torch.bfloat16
    assert state["disc.main.0.weight"].dtype == torch.float32
    ours = params["quantizer"]["embedding"].astype(ml_dtypes.bfloat16).astype(np.float32)
    np.testing.assert_array_equal(state["ae.quantize.embed.weight"].float().numpy(), ours)


@pytest.mark.parametrize(
    ("kind", "family", "hparams", "wrapped"),
    [
        ("generator", "bigr", {**BIGR, "adaln": False, "label_dropout": 0.2}, "ema"),
        ("tokenizer", "binary_ae", {**BINARY_AE, "decoder_multiplier": 2.0}, None),
    ],
)
def test_a_model_trained_here_is_written_for_pytorch(tmp_path, kind, family, hparams, wrapped):
    target = target_of(family, hparams)
    params = random_like(target, 3)
    info = {"kind": kind, "family": family, "hparams": {**hparams}}
    model_directory.write(tmp_path / "model", info, params)
    export_file(tmp_path / "model", tmp_path / "x.pt")
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    table = FAMILIES[family].convert.table(hparams)
    imported, _ = import_tensors(table, state[wrapped] if wrapped else state, target)
    assert_same_trees(imported, params)


def damage(tensors, change):
    """One fault in a state dict."""
    layer = ("layers.1.ffn_norm.weight", "encoder.blocks.1.conv1.weight")
    name = next(n for n in tensors if n.endswith(layer))
    alias = next((n for n in tensors if n.endswith("_denoise_fn.x_embedder.bias")), name)
    if change == "renamed":
        tensors["renamed"] = tensors.pop(name)
    elif change == "shape changed":
        tensors[name] = np.concatenate([tensors[name]] * 2)
    elif change == "missing":
        del tensors[name]
    elif change == "integers":
        tensors[name] = tensors[name].astype(np.int32)
    elif change == "unequal":
        tensors[alias] = tensors[alias] + 1
    return name


DAMAGE = {
    "renamed": ["1 unknown tensors: renamed", "1 missing tensors: {name} (for "],
    "shape changed": ["1 misshaped tensors: {name} ["],
    "missing": ["1 missing tensors: {name} (for "],
    "integers": ["x.pt: tensor {name} holds int32, expected floating point"],
    "unequal": ["1 unequal tensors: diffusion_processor._denoise_fn.x_embedder.bias and"],
}


@pytest.mark.parametrize(
    ("family", "change"),
    [("bigr", change) for change in DAMAGE]
    + [("binary_ae", change) for change in DAMAGE if change != "unequal"],
)
def test_damaged_files_are_named_and_leave_nothing(tmp_path, capsys, family, change):
    tensors = bigr_tensors() if family == "bigr" else binary_ae_tensors()
    name = damage(tensors, change)
    torch.save(as_torch(tensors), tmp_path / "x.pt")
    assert run(tmp_path / "x.pt", tmp_path / "model") == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("error") == 1
    assert "Traceback" not in said
    if change != "integers":  # found when it is read
        assert f"x.pt: this looks like a {family} checkpoint: d" in said
    for message in DAMAGE[change]:
        assert message.format(name=name) in said
    assert os.listdir(tmp_path) == ["x.pt"]


def test_a_truncated_file_and_one_of_another_family(tmp_path, capsys):
    save_bigr(tmp_path / "x.pt")
    assert run(tmp_path / "x.pt", tmp_path / "model", "--model=bigr_bae_d24") == 2
    said = capsys.readouterr().err
    assert "this looks like a bigr checkpoint: d5, 3 layers of width 64; bigr_bae_d24 is a" in said
    whole = (tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    assert run(tmp_path / "x.pt", tmp_path / "model") == 2
    assert "x.pt is truncated or damaged: download it again" in capsys.readouterr().err
    torch.save({"encoder.conv_in.weight": torch.ones(8, 3, 3, 3)}, tmp_path / "x.pt")
    assert run(tmp_path / "x.pt", tmp_path / "model") == 2
    said = capsys.readouterr().err
    assert f"x.pt is not recognised: bitgen reads files of {sorted(FAMILIES)}, and" in said
    assert "1 tensors, encoder.conv_in.weight ..." in said
    assert os.listdir(tmp_path) == ["x.pt"]


def test_model_overrides_what_the_file_tells(tmp_path, monkeypatch):
    # The number of heads is in no shape: 64 channels a head are assumed.
    hparams = {**BIGR, "heads": 4}
    tensors = save_bigr(tmp_path / "x.pt")
    assert import_file(tmp_path / "x.pt", tmp_path / "a").info["hparams"]["heads"] == 1
    small = zoo.Entry("small", "bigr", "S", "x.pt", hparams=hparams)
    wide = zoo.Entry("wide", "bigr", "W", "x.pt", hparams={**BIGR, "bits": 7})
    monkeypatch.setattr(zoo, "ZOO", {"small": small, "wide": wide})
    info = import_file(tmp_path / "x.pt", tmp_path / "b", model="small").info
    assert info["hparams"]["heads"] == 4
    assert info["origin"]["zoo"] == "small"
    model = model_directory.load(tmp_path / "b", "generator")
    params, _ = expected_params("bigr", hparams, tensors)
    assert_same_trees(model.params, params)
    export_file(tmp_path / "b", tmp_path / "back.pt")
    assert_same_state(torch.load(tmp_path / "back.pt", weights_only=True)["ema"], tensors)
    with pytest.raises(UserError, match=r"a bigr checkpoint: .*, not wide \(W\); these "):
        import_file(tmp_path / "x.pt", tmp_path / "c", model="wide")
    torch.save({"layers.0.attention.wqkv.weight": torch.ones(3, 1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"x\.pt is not recognised as small; these tensors"):
        import_file(tmp_path / "x.pt", tmp_path / "c", model="small")


def test_other_files_are_never_replaced_a_model_is(tmp_path, capsys):
    save_bigr(tmp_path / "x.pt")
    save_bigr(tmp_path / "y.pt", seed=1)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    assert run(tmp_path / "x.pt", tmp_path / "home") == 2
    assert "home has other files in it, choose a new directory" in capsys.readouterr().err
    assert (tmp_path / "home" / "thesis.txt").read_text() == "years of work"
    assert run(tmp_path / "x.pt", tmp_path / "y.pt") == 2
    assert "y.pt is a file, choose a new directory" in capsys.readouterr().err

    (tmp_path / "model").mkdir()  # empty
    assert run(tmp_path / "x.pt", tmp_path / "model") == 0
    before = (tmp_path / "model" / "model.json").read_text()
    torch.save({"ema": {"a": torch.ones(1)}}, tmp_path / "bad.pt")
    assert run(tmp_path / "bad.pt", tmp_path / "model") == 2
    assert (tmp_path / "model" / "model.json").read_text() == before
    assert run(tmp_path / "y.pt", tmp_path / "model") == 0
    after = json.loads((tmp_path / "model" / "model.json").read_text())
    assert after["digest"] != json.loads(before)["digest"]
    assert after["origin"]["file"] == "y.pt"


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("command", ["import", "export"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, capsys, monkeypatch, when, command):
    save_binary_ae(tmp_path / "x.th")
    argv = [tmp_path / "x.th", tmp_path / "model"]
    if command == "export":
        assert run(*argv) == 0
        argv = ["--to-torch", tmp_path / "model", tmp_path / "out.pt"]
    listing = sorted(os.listdir(tmp_path))
    capsys.readouterr()
    if when == "before":
        usage = type("Usage", (), {"free": 1000})
        monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    else:

        def full(self, *args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / "out"))

        monkeypatch.setattr(files.zipfile.ZipFile, "writestr", full)  # the end of an export
        monkeypatch.setattr(np.lib.format, "write_array", full)  # the end of an import
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("error: the disk is full: ")
    assert sorted(os.listdir(tmp_path)) == listing


def test_a_model_directory_that_does_not_fit_its_description(tmp_path):
    save_bigr(tmp_path / "x.pt")
    import_file(tmp_path / "x.pt", tmp_path / "model")
    info = json.loads((tmp_path / "model" / "model.json").read_text())
    info["hparams"]["layers"] = 2
    (tmp_path / "model" / "model.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"cannot be written as a PyTorch file; these parameters"):
        export_file(tmp_path / "model", tmp_path / "out.pt")
    with pytest.raises(UserError, match=r"out\.txt is not the name of a \.pt, \.pth, \.th file"):
        export_file(tmp_path / "model", tmp_path / "out.txt")
    assert sorted(os.listdir(tmp_path)) == ["model", "x.pt"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "INPUT and OUTPUT_DIR are needed"),
        (["x.pt"], "INPUT and OUTPUT_DIR are needed"),
        (["none.pt", "out"], "none.pt is missing: give a file"),
        (["a", "b", "c"], "unrecognized arguments: c"),
        (["a", "b", "--weights=best"], "--weights: invalid choice: 'best'"),
        (["a", "b", "--dtype=float8"], "--dtype: invalid choice: 'float8'"),
        (["a", "b", "--mode=x"], "unrecognized arguments: --mode=x"),
        (["--to-torch", "nowhere", "out.pt"], "nowhere is not a model directory"),
    ],
)
def test_wrong_commands_are_one_line(tmp_path, monkeypatch, capsys, argv, message):
    monkeypatch.chdir(tmp_path)
    assert run(*argv) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_wrong_model_is_one_line(tmp_path, capsys):
    save_bigr(tmp_path / "x.pt")
    assert run(tmp_path / "x.pt", tmp_path / "m", "--model=bigr_S") == 2
    assert "unknown model of the zoo 'bigr_S', have ['bigr_L_d24'," in capsys.readouterr().err


def test_list_prints_parameters(monkeypatch, capsys):
    monkeypatch.setattr(zoo, "ZOO", {"bitdance_B_1x": zoo.ZOO["bitdance_B_1x"]})
    monkeypatch.setattr(zoo, "TILES", {"dcae_06": zoo.TILES["dcae_06"]})
    assert run("--list", "--parameters") == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["NAME", "FAMILY", "PARAMETERS", "PUBLISHED"],
        ["bitdance_B_1x", "bitdance", "242.37M", "242M"],
        ["dcae_06", "dcae", "142.67M", "142M"],
    ]
    assert run("--parameters", "a.pt", "b") == 2
    assert "--parameters goes with --list" in capsys.readouterr().err


def test_list_prints_the_zoo(capsys):
    assert run("--list") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["NAME", *zoo.ZOO, *zoo.WEIGHTS]
