"""Reads and writes PyTorch checkpoints (`.pt`, `.pth`, `.th`), and reads `.safetensors`.

One tensor is in memory at a time. Loading runs no code: a pickle that holds anything but tensors
and plain values is refused. Of the plain values beside the weights only the kind is kept.
"""

import ctypes
import math
import mmap
import os
import pickle
import re
import shutil
import struct
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bitgen.convert.entries import Shape
from bitgen.convert.rules import to_numpy
from bitgen.errors import UserError, choose, first_line, is_disk_full

TORCH_SUFFIXES = (".pt", ".pth", ".th")
# Keys that hold one set of weights of a checkpoint; `--weights=model` takes the first one there is.
WEIGHTS = {"ema": ("ema",), "model": ("model", "state_dict", "vae")}
_PREFIXES = ("module.", "_orig_mod.")  # of PyTorch's data parallel and compiled modules

_SAFETENSORS_TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")
_HALVES = ("F16", "BF16")
_STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}
# Classes and functions of plain values that PyTorch does not load by itself, by their modules. None
# is called: an inert object stands for what it would make.
_PLAIN = {
    "argparse": "Namespace",
    "types": "SimpleNamespace",
    "builtins": "frozenset list range slice",
    "collections": "deque",
    "datetime": "date datetime time timedelta timezone",
    "decimal": "Decimal",
    "fractions": "Fraction",
    "uuid": "UUID",
    "numpy": "dtype ndarray",
    "numpy.core.multiarray": "scalar _reconstruct",
    "numpy._core.multiarray": "scalar _reconstruct",
    "numpy._core.numeric": "_frombuffer",
    "pathlib": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "pathlib._local": "Path PosixPath WindowsPath PurePath PurePosixPath PureWindowsPath",
    "torch.torch_version": "TorchVersion",
}
_ROOT = "archive"  # the folder in a PyTorch file
_ALIGNMENT = 64  # bytes; of the tensors in a file that is to be mapped into memory


@dataclass(frozen=True, eq=False)
class Tensors(Mapping[str, np.ndarray]):
    """The tensors of one file: shapes at once, values each time they are read.

    Half types are read as float32, which is exact.
    """

    path: Path
    bytes: int  # in its files
    wrapped: str | None  # the key of the file that held them; None for a bare state dict
    shapes: dict[str, Shape]
    places: Mapping[str, Hashable]  # equal for names of the same values in the file
    read: Callable[[str], np.ndarray]
    others: tuple[str, ...] = ()  # what else the file holds, in words

    def __getitem__(self, name: str) -> np.ndarray:
        """Returns a copy of a tensor."""
        return self.read(name)

    def __iter__(self) -> Iterator[str]:
        """Iterates over the names."""
        return iter(self.shapes)

    def __len__(self) -> int:
        """Returns the number of names."""
        return len(self.shapes)


def open_tensors(path: str | os.PathLike, weights: str | None = None) -> Tensors:
    """Returns the tensors of a checkpoint file, whatever its suffix.

    Args:
      path: the file. A PyTorch file is mapped into memory, or read whole if it is from before
        PyTorch 1.6.
      weights: 'ema' or 'model', for a file with several sets; by default 'ema' if there is one.

    Raises UserError for a file that is missing, truncated, damaged, without these weights, of
    another kind, or that holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is {'a directory' if path.is_dir() else 'missing'}: give a file")
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise UserError(f"{path} is empty: download it again")
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise UserError(f"{path} is a web page, not a checkpoint: download the file itself")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        if weights is not None:
            raise UserError(f"{path} holds one set of weights: leave out --weights")
        return _open_safetensors(path)
    return _open_torch(path, weights, zipped=head.startswith(b"PK\x03\x04"))


def _open_torch(path: Path, weights: str | None, zipped: bool) -> Tensors:
    try:
        import torch
    except ImportError:
        raise UserError(f"{path} needs PyTorch to be read: pip install 'bitgen[convert]'") from None

    mapped = zipped and _is_stored(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickles that it then fails to read
            with torch.serialization.safe_globals(_plain_globals()):
                content = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as e:
        if found := re.search(r"GLOBAL (\S+)", str(e)):
            raise UserError(
                f"{path} is refused: it holds a {found[1]}, and loading that may run code; save "
                "its tensors alone, torch.save({'ema': state_dict}, ...), where you trust the file"
            ) from None
        raise UserError(f"{path} is not a PyTorch checkpoint, or it is damaged") from None
    except Exception as e:  # a damaged file makes the unpickler raise about anything
        reason = first_line(e)[:200]
        raise UserError(f"{path} is truncated or damaged ({reason}): download it again") from None
    wrapped, state = _unwrap(content, weights, path)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            kind = type(value).__name__
            raise UserError(f"{path}: {name!r} holds a {kind}, not a tensor of a state dict")
    state = without_prefix(state)

    def read(name: str) -> np.ndarray:
        tensor = state[name]
        array = np.array(to_numpy(tensor), order="C")
        if mapped:
            _give_back(tensor)
        return array

    places = {
        name: (t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.stride(), t.dtype)
        for name, t in state.items()
    }
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    others = () if wrapped is None else _others(content, wrapped)
    return Tensors(path, path.stat().st_size, wrapped, shapes, places, read, others)


class _Plain:
    """Stands for a plain value that nobody reads; nothing that the file says is run."""

    def __new__(cls, *_: Any) -> "_Plain":
        return object.__new__(cls)

    def __init__(self, *_: Any):
        pass

    def __setstate__(self, state: Any) -> None:
        """Forgets the state."""


def _plain_globals() -> list[Any]:
    """Returns stand-ins and the full names that they stand for, as PyTorch takes them."""
    globals_: list[Any] = [(lambda *_: {}, "collections.defaultdict")]
    for module, names in _PLAIN.items():
        globals_ += [(type(name, (_Plain,), {}), f"{module}.{name}") for name in names.split()]
    return globals_


def _others(content: dict, wrapped: str) -> tuple[str, ...]:
    """Returns what a file holds beside the weights, such as 'args (Namespace)'."""

    def kind(value: Any) -> str:
        return f"{len(value)} entries" if isinstance(value, dict) else type(value).__name__

    return tuple(f"{key} ({kind(value)})" for key, value in content.items() if key != wrapped)


def _is_stored(path: Path) -> bool:
    """Whether a zip file is not compressed; raises UserError if its end is missing."""
    try:
        with zipfile.ZipFile(path) as file:
            return all(info.compress_type == zipfile.ZIP_STORED for info in file.infolist())
    except zipfile.BadZipFile:
        raise UserError(f"{path} is truncated or damaged: download it again") from None


def _unwrap(content: Any, weights: str | None, path: Path) -> tuple[str | None, dict]:
    """Returns the key, if any, and the state dict that it holds."""
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of tensors")
    held = [key for key, value in content.items() if isinstance(value, dict) and value]
    keys = {
        choice: next((key for key in names if key in held), None)
        for choice, names in WEIGHTS.items()
    }
    if not any(keys.values()):
        if weights is not None:
            raise UserError(f"{path} holds one set of weights: leave out --weights")
        return None, content
    key = keys[weights] if weights else keys["ema"] or keys["model"]
    if key is None:
        have = [choice for choice in WEIGHTS if keys[choice]]
        raise UserError(f"{path} has no weights {weights!r}, have {have}")
    _, state = _unwrap(content[key], None, path)
    return key, state


def without_prefix(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a state dict without the prefixes that PyTorch gives wrapped modules' names."""
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            return without_prefix({n.removeprefix(prefix): x for n, x in state.items()})
    return state


def _give_back(tensor: Any) -> None:
    """Releases the pages of a mapped tensor, which otherwise count as this process's memory."""
    if not sys.platform.startswith("linux"):
        return
    storage = tensor.untyped_storage()
    first = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    last = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if last > first:
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), mmap.MADV_DONTNEED)


def _open_safetensors(path: Path) -> Tensors:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"{path} needs safetensors: pip install 'bitgen[convert]'") from None

    try:
        file = safe_open(path, "np", backend="pread")  # pages of a mapped file count as our memory
    except SafetensorError as e:
        raise UserError(f"{path} is truncated or damaged ({e}): download it again") from None
    names = without_prefix({name: name for name in file.offset_keys()})
    slices = {name: file.get_slice(inner) for name, inner in names.items()}
    for name, part in slices.items():
        choose(f"type of {name} in {path}:", part.get_dtype(), _SAFETENSORS_TYPES)
    shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}

    def read(name: str) -> np.ndarray:
        array = file.get_tensor(names[name])
        return array.astype(np.float32) if slices[name].get_dtype() in _HALVES else array

    return Tensors(path, path.stat().st_size, None, shapes, names, read)


def check_space(directory: Path, size: int) -> None:
    """Raises UserError if the disk of a directory, or of its first existing parent, lacks space."""
    directory = directory.absolute()
    there = next(p for p in (directory, *directory.parents) if p.exists())
    free = shutil.disk_usage(there).free
    if free < size:
        raise UserError(
            f"the disk is full: {directory} needs {size / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )


@dataclass(frozen=True)
class _Storage:
    """The persistent id that PyTorch pickles for a tensor's values: an entry of the zip file."""

    key: str
    dtype: str
    count: int


class _StoredTensor:
    def __init__(self, storage: _Storage, shape: Shape):
        self.storage, self.shape = storage, shape

    def __reduce__(self):
        """Returns the call that rebuilds the tensor."""
        import torch

        stride = tuple(math.prod(self.shape[i + 1 :]) for i in range(len(self.shape)))
        arguments = (self.storage, 0, self.shape, stride, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        import torch

        if isinstance(obj, _Storage):
            return "storage", getattr(torch, _STORAGES[obj.dtype]), obj.key, "cpu", obj.count
        return None


def write_torch(
    path: str | os.PathLike, tensors: Iterable[tuple[str, np.ndarray]], wrapped: str | None
) -> int:
    """Writes a file that `torch.load` reads, also mapped, and returns the number of names.

    Args:
      path: the file; it appears, or replaces the one before, only when complete.
      tensors: each name and its C-contiguous array, taken one at a time; consecutive names of one
        array share its values in the file.
      wrapped: the key that holds the state dict; None for a bare state dict.

    Raises UserError if the disk is full.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".writing")
    path.parent.mkdir(parents=True, exist_ok=True)
    state: dict[str, _StoredTensor] = {}
    storage, last = None, None
    try:
        with temporary.open("wb") as raw, zipfile.ZipFile(raw, "w") as file:
            for name, array in tensors:
                if array is not last or storage is None:
                    storage = _Storage(str(len(state)), array.dtype.name, array.size)
                    _add_entry(file, f"{_ROOT}/data/{storage.key}", array)
                    last = array
                state[name] = _StoredTensor(storage, array.shape)
            # A ZipInfo of its own, or entries would carry the time and files differ.
            with file.open(zipfile.ZipInfo(f"{_ROOT}/data.pkl"), "w") as entry:
                _Pickler(entry, protocol=2).dump({wrapped: state} if wrapped else state)
            for name, text in (("byteorder", sys.byteorder), ("version", "3\n")):
                file.writestr(zipfile.ZipInfo(f"{_ROOT}/{name}"), text)
        os.replace(temporary, path)
    except OSError as e:
        if is_disk_full(e):
            raise UserError(f"the disk is full: {path} was not written") from None
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return len(state)


def _add_entry(file: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    """Adds the values of an array, placed so that they can be mapped."""
    entry = zipfile.ZipInfo(name)
    assert file.fp is not None
    # A local header is 30 bytes, the name, 20 bytes for the sizes of 64 bits, and the padding.
    padding = -(file.fp.tell() + 30 + len(name) + 20 + 4) % _ALIGNMENT
    entry.extra = struct.pack("<HH", 0x4246, padding) + bytes(padding)
    with file.open(entry, "w", force_zip64=True) as out:
        out.write(array.reshape(-1).view(np.uint8).data)
