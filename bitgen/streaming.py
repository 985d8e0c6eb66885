"""Parameters to and from disk one array at a time, for models that memory does not hold twice.

On disk they are the Orbax checkpoints that `model_directory` saves and restores whole.
"""

import asyncio
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

_CHUNK = 64 << 20  # bytes that are compressed, and read back, together


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is made when its turn to be written comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def save(directory: Path, params: Any) -> str:
    """Saves a nested dict of LazyArray, made one after another, and returns their digest.

    For a single process.
    """
    running, leaves = Digest(), []
    paths, structure = jax.tree_util.tree_flatten_with_path(params)
    for path, leaf in paths:

        def make(path=path, leaf=leaf):
            array = leaf.make()
            running.add(path, array)
            return array

        leaves.append(LazyArray(leaf.shape, leaf.dtype, make))
    types = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, _LazyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # of no use, but Orbax warns without it
    )
    args = ocp.args.PyTreeSave(
        jax.tree.unflatten(structure, leaves),
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), params),
        ocdbt_target_data_file_size=4 * _CHUNK,  # what is held before it is written
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory, args=args)
    return running.value()


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes LazyArrays as Orbax writes numpy arrays, each made when the last is on disk."""

    async def serialize(self, values, infos, args=None):
        # In the order of the tree, which the digest relies on.
        for value, info, arg in zip(values, infos, args or [None] * len(values), strict=True):
            array = value.make()
            for commit in await super().serialize([array], [info], [arg or ocp.SaveArgs()]):
                await asyncio.to_thread(commit.result)
            del array
        return []


def open_arrays(directory: Path) -> dict[str, Any]:
    """Returns a nested dict of StoredArray; raises ValueError, KeyError or OSError for none."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.metadata(directory).item_metadata
    if found is None:
        raise FileNotFoundError(f"no parameters in {directory}")
    reader = _Reader(directory)
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: StoredArray(
            reader, tuple(key.key for key in path), tuple(leaf.shape), np.dtype(leaf.dtype)
        ),
        found.tree,
    )


class StoredArray:
    """An array on disk, read when it is indexed or turned into a numpy array."""

    def __init__(
        self,
        reader: "_Reader",
        keys: tuple[str, ...],
        shape: tuple[int, ...],
        dtype: np.dtype,
    ):
        self.reader, self.keys, self.shape, self.dtype = reader, keys, shape, dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the values."""
        return np.asarray(self.reader.read(self.keys), dtype=dtype)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns a slice of the values."""
        return self.reader.read(self.keys)[index]


class _Reader:
    """Reads single arrays; keeps the last one, whose slices are asked for together."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.keys, self.array = None, None

    def read(self, keys: tuple[str, ...]) -> np.ndarray:
        if keys != self.keys:
            self.keys = self.array = None  # let go of one before the next
            item, how = 0, ocp.RestoreArgs(restore_type=np.ndarray)
            for key in reversed(keys):
                item, how = {key: item}, {key: how}
            args = ocp.args.PyTreeRestore(item, restore_args=how, partial_restore=True)
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                found: Any = checkpointer.restore(self.directory, args=args)
            for key in keys:
                found = found[key]
            self.keys, self.array = keys, found
        assert self.array is not None
        return self.array


class Digest:
    """A short hash of names, shapes, dtypes and values of arrays, in the order that they come."""

    def __init__(self):
        self.hash = hashlib.blake2b(digest_size=8)

    def add(self, path: Any, leaf: Any) -> None:
        """Adds one array under its path in a tree."""
        array = np.ascontiguousarray(leaf)
        self.hash.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        self.hash.update(array.reshape(-1).view(np.uint8).data)

    def value(self) -> str:
        """Returns the hash of what was added."""
        return self.hash.hexdigest()
