"""Checkpoints in several files, as Hugging Face's libraries write them."""

import json

import numpy as np
import pytest
import torch
from helpers import checkpoint_files
from safetensors.numpy import save_file

from bitgen.convert.directory import import_file
from bitgen.convert.shards import open_checkpoint
from bitgen.errors import UserError

RNG = np.random.default_rng(0)
ARRAYS = {name: RNG.standard_normal(3).astype(np.float32) for name in ("a.x", "a.y", "b.x")}
STEMS = {"safetensors": "model.safetensors", "torch": "pytorch_model.bin"}


def write_shards(folder, arrays, kind, count=2, prefix=""):
    """Writes the shards and their index; returns the index's path."""
    stem, suffix = STEMS[kind].split(".")
    folder.mkdir(exist_ok=True)
    places = {}
    for i in range(count):
        name = f"{stem}-{i + 1:05d}-of-{count:05d}.{suffix}"
        part = {prefix + n: arrays[n] for n in list(arrays)[i::count]}
        if kind == "safetensors":
            save_file(part, folder / name)
        else:
            torch.save(checkpoint_files.as_torch(part), folder / name)
        places |= dict.fromkeys(part, name)
    index = folder / f"{STEMS[kind]}.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return index


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", STEMS)
def test_an_index_and_its_folder_are_read(tmp_path, kind, prefix):
    index = write_shards(tmp_path / "x", ARRAYS, kind, prefix=prefix)
    (tmp_path / "x" / "config.json").write_text("{}")
    for path in (index, index.parent):
        tensors = open_checkpoint(path)
        assert set(tensors) == set(ARRAYS)
        assert len(set(tensors.places.values())) == len(ARRAYS)
        assert tensors.bytes > sum(x.nbytes for x in ARRAYS.values())
        assert not tensors.others
        for name, array in ARRAYS.items():
            assert tensors.shapes[name] == (3,)
            np.testing.assert_array_equal(tensors[name], array)
    with pytest.raises(UserError, match="leave out --weights"):
        open_checkpoint(index, "ema")


@pytest.mark.parametrize("kind", STEMS)
def test_shards_give_the_model_that_one_file_gives(tmp_path, kind):
    tensors = checkpoint_files.save_bigr(tmp_path / "x.pt")
    index = write_shards(tmp_path / "x", tensors, kind, count=3)
    one = import_file(tmp_path / "x.pt", tmp_path / "one")
    several = import_file(index.parent, tmp_path / "several")
    assert several.info["digest"] == one.info["digest"]
    assert several.info["origin"]["file"] == index.name


def test_a_folder_with_one_checkpoint_is_that_checkpoint(tmp_path):
    save_file(ARRAYS, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "README.md").write_text("")
    assert set(open_checkpoint(tmp_path)) == set(ARRAYS)
    save_file(ARRAYS, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"several checkpoints: give one of diff.*, other\.safet"):
        open_checkpoint(tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none holds no checkpoint"):
        open_checkpoint(tmp_path / "none")


def test_missing_extra_and_wrong_shards_are_named(tmp_path):
    index = write_shards(tmp_path / "x", ARRAYS, "safetensors")
    first, second = (index.parent / f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
    extra = index.parent / "model-00003-of-00003.safetensors"
    save_file(ARRAYS, extra)
    assert open_checkpoint(index).others == (f"{extra.name} (not in {index.name})",)
    extra.unlink()
    save_file({"c": np.zeros(1, np.float32)}, second)
    with pytest.raises(UserError, match=rf"{second.name} lacks 1 tensors .* such as a\.y"):
        open_checkpoint(index)
    second.unlink()
    with pytest.raises(UserError, match=rf"names 2 shards, of which 1 are missing: {second.name}"):
        open_checkpoint(index.parent)
    index.unlink()
    save_file(ARRAYS, second)
    with pytest.raises(UserError, match=r"holds shards without their index, \*\.index\.json"):
        open_checkpoint(first.parent)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "{" * 9,
        '{"weight_map": 3}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../x.safetensors"}}',
    ],
)
def test_a_damaged_index_is_one_clear_error(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"is no index of shards|names no tensors"):
        open_checkpoint(path)
