"""Reading and writing checkpoint files: what is in them, what is refused, what is left on disk."""

import argparse
import collections
import datetime
import errno
import json
import os
import pathlib
import pickle
import re
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from bitgen.convert import files
from bitgen.convert.files import check_space, open_tensors, write_torch
from bitgen.errors import UserError

RNG = np.random.default_rng(0)
ARRAYS = {
    "a.weight": RNG.standard_normal((3, 4)).astype(np.float32),
    "a.bias": RNG.standard_normal(4).astype(np.float32),
    "scalar": np.array(5, np.int64),
    "empty": np.zeros((0, 2), np.float32),
    "deep.er": RNG.standard_normal((2, 3, 1, 5)).astype(np.float64),
}


def state_dict(scale=1.0):
    return {n: torch.from_numpy(np.array(x * scale).astype(x.dtype)) for n, x in ARRAYS.items()}


def assert_holds(tensors, arrays):
    assert set(tensors) == set(arrays)
    assert len(tensors) == len(arrays)
    for name, array in arrays.items():
        assert tensors.shapes[name] == array.shape
        assert tensors[name].dtype == array.dtype
        assert tensors[name].tobytes() == array.tobytes()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("wrap", "wrapped"),
    [
        (lambda s: s, None),
        (lambda s: {"ema": s}, "ema"),
        (lambda s: {"model": {"x": torch.ones(1)}, "ema": s, "step": 7}, "ema"),
        (lambda s: {"state_dict": s, "epoch": 3}, "state_dict"),
        (lambda s: {"vae": s}, "vae"),
        (lambda s: {"ema": {"state_dict": s}}, "ema"),
        (lambda s: {f"module._orig_mod.{n}": x for n, x in s.items()}, None),
    ],
)
def test_wrapped_files_are_unwrapped(tmp_path, wrap, wrapped, zipped):
    torch.save(wrap(state_dict()), tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    tensors = open_tensors(tmp_path / "x.pt")
    assert tensors.wrapped == wrapped
    assert_holds(tensors, ARRAYS)


def test_weights_are_chosen(tmp_path):
    path = tmp_path / "x.th"
    torch.save({"ema": state_dict(1), "model": state_dict(2)}, path)
    assert_holds(open_tensors(path), ARRAYS)
    assert_holds(open_tensors(path, "ema"), ARRAYS)
    tensors = open_tensors(path, "model")
    assert tensors.wrapped == "model"
    np.testing.assert_array_equal(tensors["a.bias"], 2 * ARRAYS["a.bias"])
    torch.save({"state_dict": state_dict()}, path)
    assert open_tensors(path, "model").wrapped == "state_dict"
    with pytest.raises(UserError, match=r"x\.th has no weights 'ema', have \['model'\]"):
        open_tensors(path, "ema")
    torch.save(state_dict(), path)
    with pytest.raises(UserError, match="one set of weights: leave out --weights"):
        open_tensors(path, "ema")


def test_half_types_and_views_are_read_exactly(tmp_path):
    base = torch.arange(12, dtype=torch.float32).reshape(3, 4)
    state = {
        "bfloat16": torch.tensor([1.5, -3.0]).to(torch.bfloat16),
        "float16": torch.tensor([0.1, 2.0]).to(torch.float16),
        "transposed": base.T,
        "part": base[1:, 2],
        "repeated": base[:1].expand(3, 4),
    }
    torch.save(state, tmp_path / "x.pt")
    tensors = open_tensors(tmp_path / "x.pt")
    for name, tensor in state.items():
        assert tensors[name].dtype == np.float32
        assert tensors[name].flags.c_contiguous
        np.testing.assert_array_equal(tensors[name], tensor.float().numpy())


def test_names_of_the_same_values_have_one_place(tmp_path):
    shared = torch.arange(6.0)
    state = {"a": shared, "b": shared, "copy": shared.clone(), "part": shared[:3]}
    state |= {"other part": shared[3:], "turned": shared.reshape(2, 3).T, "flat": shared[None]}
    torch.save(state, tmp_path / "x.pt")
    places = open_tensors(tmp_path / "x.pt").places
    assert places["a"] == places["b"]
    assert len({places[name] for name in state}) == len(state) - 1


def test_safetensors(tmp_path):
    half = {
        "bf16": np.array([1.5, -3.0]).astype(ml_dtypes.bfloat16),
        "f16": np.array([[0.1]], np.float16),
    }
    save_file({**ARRAYS, **half}, tmp_path / "x.safetensors", metadata={"format": "pt"})
    (tmp_path / "x.safetensors").rename(tmp_path / "x.bin")  # the content tells
    tensors = open_tensors(tmp_path / "x.bin")
    assert_holds(tensors, {**ARRAYS, **{n: x.astype(np.float32) for n, x in half.items()}})
    with pytest.raises(UserError, match="leave out --weights"):
        open_tensors(tmp_path / "x.bin", "ema")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_pages_of_a_mapped_file_are_given_back(tmp_path):
    path = tmp_path / "large.pt"
    state = {f"x{i}": torch.full((1 << 20,), float(i)) for i in range(4)}
    torch.save(state, path)
    tensors = open_tensors(path)
    for _ in range(2):  # a given back page is read from the file again
        for i in range(4):
            np.testing.assert_array_equal(tensors[f"x{i}"], float(i))
    with open("/proc/self/smaps") as smaps:
        text = smaps.read()
    (resident,) = re.findall(rf"{re.escape(str(path))}\n.*?Rss: +(\d+) kB", text, re.DOTALL)
    assert int(resident) < 100  # of 16 MiB


class Payload:
    """Unpickled, it would make a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, zipped):
    path, trap = tmp_path / "x.pt", tmp_path / "trap"
    content = {"ema": state_dict(), "x": Payload(trap)}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"x\.pt is refused: it holds a (posix|os|nt)\.mkdir, and"):
        open_tensors(path)
    path.write_bytes(pickle.dumps(Payload(trap)))
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        open_tensors(path)
    assert not trap.exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_values_beside_the_weights_are_named_and_not_read(tmp_path, zipped):
    """As the training scripts of BitDance and BiGR write them, and what else users keep there."""
    model = torch.nn.Linear(2, 3)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimiser.step()
    others = {
        "optimizer": optimiser.state_dict(),
        "args": argparse.Namespace(lr=1e-4, path=pathlib.Path("a/b")),
        "settings": types.SimpleNamespace(lr=1),
        "path": pathlib.PurePosixPath("a/b"),
        "windows": pathlib.PureWindowsPath("a/b"),
        "best": np.float64(0.5),
        "steps": np.int64(5),
        "dtype": np.dtype("float32"),
        "losses": np.arange(4.0),
        "history": collections.defaultdict(list, {"loss": [1.0]}),
        "ordered": collections.OrderedDict(a=1),
        "counter": collections.Counter("ab"),
        "when": datetime.datetime(2026, 1, 2),
        "names": frozenset({"a"}),
        "torch": torch.__version__,
        "epoch": 3,
        "rng": torch.get_rng_state(),
    }
    path = tmp_path / "x.pt"
    content = {"model": {"x": torch.ones(1)}, "ema": state_dict(), **others}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    tensors = open_tensors(path)
    assert_holds(tensors, ARRAYS)
    assert [text.split()[0] for text in tensors.others] == ["model", *others]
    assert "args (Namespace)" in tensors.others
    assert "optimizer (2 entries)" in tensors.others
    assert "best (scalar)" in tensors.others
    torch.save({"ema": {"a": np.float64(1)}}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="'a' holds a scalar, not a tensor"):
        open_tensors(path)


def test_what_a_plain_value_hides_is_not_run(tmp_path):
    trap = tmp_path / "trap"
    torch.save(
        {"ema": state_dict(), "args": argparse.Namespace(x=Payload(trap))}, tmp_path / "x.pt"
    )
    with pytest.raises(UserError, match=r"refused: it holds a (posix|os|nt)\.mkdir"):
        open_tensors(tmp_path / "x.pt")
    assert not trap.exists()


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated_files_are_named(tmp_path, kind):
    path = tmp_path / "x.pt"
    if kind == "safetensors":
        path = tmp_path / "x.safetensors"
        save_file(ARRAYS, path)
    else:
        torch.save(state_dict(), path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    assert_holds(open_tensors(path), ARRAYS)
    for size in (0, 3, 11, 100, len(whole) // 2, len(whole) - 20, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=f"{path.name} is (empty|truncated|damaged|not a)") as e:
            open_tensors(path)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html>\n<html>Google Drive", "is a web page, not a checkpoint"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\x00\x01\x02" * 50, "not a PyTorch checkpoint|truncated or damaged"),
        (b"PK\x03\x04" + b"\x00" * 50, "is truncated or damaged"),
        (b"{}" * 20, "not a PyTorch checkpoint|truncated"),
        ([1, 2], "holds a list, not a dict of tensors"),
        ({"a": torch.ones(1), "n": 3}, "'n' holds a int, not a tensor"),
        ({"weights": {"a": torch.ones(1)}}, "'weights' holds a dict, not a tensor"),
    ],
)
def test_what_holds_no_state_dict_is_named(tmp_path, content, message):
    path = tmp_path / "x.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(UserError, match=message):
        open_tensors(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dtype": "F8_E4M3", "shape": [48]},
            r"unknown type of a\.weight in .*: 'F8_E4M3', have \['BF16'",
        ),
        ({"shape": "?"}, "is truncated or damaged .*invalid type"),
        ({"shape": [4, 4]}, "is truncated or damaged .*invalid shape"),
        ({"data_offsets": [0, 10**6]}, "is truncated or damaged"),
    ],
)
def test_safetensors_headers_that_lie_are_named(tmp_path, change, message):
    path = tmp_path / "x.safetensors"
    save_file({"a.weight": ARRAYS["a.weight"]}, path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header["a.weight"].update(change)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[start:])
    with pytest.raises(UserError, match=message):
        open_tensors(path)
    path.write_bytes((10).to_bytes(8, "little") + b"{not json]" + data[start:])
    with pytest.raises(UserError, match=r"is truncated or damaged .*invalid JSON"):
        open_tensors(path)


def test_missing_files_and_directories_are_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.pt is missing"):
        open_tensors(tmp_path / "none.pt")
    with pytest.raises(UserError, match="is a directory: give a file"):
        open_tensors(tmp_path)


@pytest.mark.parametrize("wrapped", [None, "ema"])
@pytest.mark.parametrize("mapped", [True, False])
def test_a_written_file_is_what_pytorch_reads(tmp_path, wrapped, mapped):
    path = tmp_path / "x.pt"
    half = {"bf16": np.array([1.5, -3.0]).astype(ml_dtypes.bfloat16), "bool": np.array([True])}
    arrays = {**ARRAYS, **half, "large": np.arange(10**5, dtype=np.float32)}
    assert write_torch(path, iter(arrays.items()), wrapped) == len(arrays)
    state = torch.load(path, weights_only=True, mmap=mapped)
    state = state if wrapped is None else state[wrapped]
    assert list(state) == list(arrays)
    for name, array in arrays.items():
        assert str(state[name].dtype) == f"torch.{array.dtype.name}"
        assert state[name].shape == array.shape
        assert state[name].is_contiguous()
        assert bytes(state[name].reshape(-1).view(torch.uint8).tolist()) == array.tobytes()
    reader = torch._C.PyTorchFileReader(str(path))
    records = [name for name in reader.get_all_records() if name.startswith("data/")]
    assert len(records) == len(arrays)
    assert all(reader.get_record_offset(name) % 64 == 0 for name in records)
    with zipfile.ZipFile(path) as file:
        assert file.testzip() is None


def test_names_of_one_array_share_it_in_the_file(tmp_path):
    x = np.arange(1000, dtype=np.float32)
    write_torch(tmp_path / "x.pt", iter([("a", x), ("b", x), ("c", x.copy())]), None)
    state = torch.load(tmp_path / "x.pt", weights_only=True)
    assert state["a"].data_ptr() == state["b"].data_ptr() != state["c"].data_ptr()
    assert (tmp_path / "x.pt").stat().st_size < 2.5 * x.nbytes


def test_the_same_tensors_make_the_same_file(tmp_path):
    for name in ("a.pt", "b.pt"):
        write_torch(tmp_path / name, iter(ARRAYS.items()), "ema")
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_nothing_half_written_is_left(tmp_path):
    path = tmp_path / "x.pt"

    def broken():
        yield "a", np.ones(3, np.float32)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"the disk is full: .*x\.pt was not written"):
        write_torch(path, broken(), None)
    assert list(tmp_path.iterdir()) == []
    write_torch(path, iter(ARRAYS.items()), None)
    before = path.read_bytes()
    with pytest.raises(UserError, match="the disk is full"):
        write_torch(path, broken(), None)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == before


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage)
    check_space(tmp_path / "not" / "there", 1000)
    with pytest.raises(UserError, match=r"the disk is full: .*there needs 0\.00 GB, 0\.00 GB are"):
        check_space(tmp_path / "not" / "there", 1001)
