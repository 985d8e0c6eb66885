"""Model directories: what is written whole, streamed and carried, and that nothing is left half."""

import errno
import gc
import json
import os
import shutil
import weakref

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from helpers.checkpoint_files import assert_same_trees, random_like, target_of

from bitgen.errors import UserError
from bitgen.hub import model_directory, streaming
from bitgen.hub.streaming import LazyArray

TOKENIZER = {
    "width": 32,
    "multipliers": (1,),
    "blocks": 1,
    "bits": 4,
    "embed_dim": 32,
    "image_size": 8,
    "attention_resolutions": (),
}
INFO = {"kind": "tokenizer", "family": "binary_ae", "hparams": TOKENIZER}


def random_params(dtype=np.float32):
    return jax.tree.map(lambda x: x.astype(dtype), random_like(target_of("binary_ae", TOKENIZER)))


def lazily(params, make=lambda x: x):
    return jax.tree.map(lambda x: LazyArray(x.shape, x.dtype, lambda: make(x)), params)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_streamed_is_what_is_written_whole(tmp_path, dtype):
    params = random_params(dtype)
    model_directory.write(tmp_path / "whole", INFO, params)
    model_directory.write(tmp_path / "streamed", INFO, lazily(params))
    infos = [model_directory.read_info(tmp_path / name) for name in ("whole", "streamed")]
    assert infos[0] == infos[1]
    assert infos[0]["digest"] == model_directory.digest(params)
    for name in ("whole", "streamed"):
        loaded = model_directory.load(tmp_path / name, "tokenizer").params
        assert_same_trees(loaded, jax.tree.map(lambda x: x.astype(np.float32), params))
        assert_same_trees(model_directory.open_params(tmp_path / name), params)
        with ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            assert_same_trees(checkpointer.restore(tmp_path / name / "params"), params)


def test_streaming_holds_one_large_array_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_CHUNK", 4000)
    sizes = {"a": 2000, "b": 10, "c": 10, "d": 900, "e": 3000, "f": 1}
    params = {n: np.full((size,), i, np.float32) for i, (n, size) in enumerate(sizes.items())}
    alive, most = weakref.WeakValueDictionary(), []

    def make(x):
        gc.collect()
        array = x.copy()
        alive[len(most)] = array
        most.append(sum(a.size for a in alive.values()))
        return array

    model_directory.write(tmp_path / "model", INFO, lazily(params, make))
    assert len(most) == len(sizes)  # each once
    assert max(most) == 3000
    stored = model_directory.open_params(tmp_path / "model")
    assert {name: x.shape for name, x in stored.items()} == {n: (s,) for n, s in sizes.items()}
    for name in sizes:
        assert stored[name].dtype == np.float32
        np.testing.assert_array_equal(np.asarray(stored[name]), params[name])
        held = sum(x.size for x in stored[name].reader.arrays.values())
        assert held <= max(1000, sizes[name])
    assert stored["a"][5] == 0


def test_carried_tensors(tmp_path):
    carried = {
        "disc.main.0.weight": np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32),
        "disc.main.3.num_batches_tracked": np.array(3, np.int64),
        "x": np.zeros((0, 2), np.float32),
    }
    model_directory.write(tmp_path / "a", INFO, random_params(), iter(carried.items()))
    assert_same_trees(model_directory.load_carried(tmp_path / "a"), carried)
    model_directory.write(tmp_path / "b", INFO, random_params())
    assert model_directory.load_carried(tmp_path / "b") == {}
    assert not (tmp_path / "b" / "carried.npz").exists()
    data = (tmp_path / "a" / "carried.npz").read_bytes()
    (tmp_path / "a" / "carried.npz").write_bytes(data[:100])
    with pytest.raises(UserError, match=r"carried\.npz is damaged"):
        model_directory.load_carried(tmp_path / "a")


def failing(error):
    def make(x):
        raise error

    return lazily(random_params(), make)


@pytest.mark.parametrize("before", [False, True])
def test_a_failure_leaves_what_was_there(tmp_path, before):
    if before:
        model_directory.write(tmp_path / "model", INFO, random_params())
    listing = os.listdir(tmp_path)
    for error in (UserError("bad"), RuntimeError("bad"), KeyboardInterrupt("bad")):
        with pytest.raises(type(error), match="bad"):
            model_directory.write(tmp_path / "model", INFO, failing(error))
        assert os.listdir(tmp_path) == listing
    full = os.strerror(errno.ENOSPC)
    for error in (OSError(errno.ENOSPC, full), ValueError(f"RESOURCE_EXHAUSTED: x: {full}")):
        with pytest.raises(UserError, match=r"the disk is full: .*model was not written"):
            model_directory.write(tmp_path / "model", INFO, failing(error))
        assert os.listdir(tmp_path) == listing
    if before:
        model_directory.load(tmp_path / "model", "tokenizer")


def test_a_failed_write_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_CHUNK", 4)  # one after another

    def make(x):
        for directory in tmp_path.glob("model.writing/params*/*.process_0"):
            shutil.rmtree(directory)
            directory.write_text("in the way")
        return x

    params = {"a": np.ones(5, np.float32), "b": np.ones(5, np.float32)}
    with pytest.raises(ValueError, match="process_0"):
        model_directory.write(tmp_path / "model", INFO, lazily(params, make))
    assert os.listdir(tmp_path) == []


def test_other_files_are_not_replaced(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="has other files in it, choose a new directory"):
        model_directory.write(tmp_path, INFO, random_params())
    with pytest.raises(UserError, match=r"notes\.txt is a file, choose a new directory"):
        model_directory.write(tmp_path / "notes.txt", INFO, random_params())
    assert os.listdir(tmp_path) == ["notes.txt"]


def test_what_is_no_model_directory_is_named(tmp_path):
    with pytest.raises(UserError, match=r"is not a model directory: it has no model\.json"):
        model_directory.load(tmp_path, "tokenizer")
    (tmp_path / "x.pt").write_bytes(b"weights")
    with pytest.raises(
        UserError, match=r"x\.pt is a file: `python -m bitgen\.convert .*x\.pt DIR`"
    ):
        model_directory.load(tmp_path / "x.pt", "tokenizer")
    model_directory.write(tmp_path / "model", INFO, random_params())
    with pytest.raises(UserError, match=r"holds a tokenizer \(binary_ae\), not a generator"):
        model_directory.load(tmp_path / "model", "generator")
    shutil.rmtree(tmp_path / "model" / "params")
    with pytest.raises(UserError, match=r"the parameters in .*model cannot be read"):
        model_directory.load(tmp_path / "model", "tokenizer")
    with pytest.raises(UserError, match=r"the parameters in .*model cannot be read"):
        model_directory.open_params(tmp_path / "model")
    file = tmp_path / "model" / "model.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "format": 99}))
    with pytest.raises(UserError, match="has format 99, this version reads format 1"):
        model_directory.load(tmp_path / "model", "tokenizer")
