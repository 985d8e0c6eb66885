"""Reads and writes parameters a few at a time, for models larger than memory.

On disk they are the Orbax checkpoints that `model_directory` saves and restores completely.
"""

import asyncio
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict, unflatten_dict

_CHUNK = 64 << 20  # bytes that are compressed, and read back, together


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """An array that is made when it is written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]


def save(directory: Path, params: Any) -> str:
    """Saves a nested dict of LazyArray one after another, and returns their digest.

    For a single process.
    """
    running = Digest()

    def hashed(path, leaf):
        def make():
            array = leaf.make()
            running.add(path, array)
            return array

        return LazyArray(leaf.shape, leaf.dtype, make)

    writer = _LazyHandler(deepcopy_host_arrays=False)
    types = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, writer),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # not used, but Orbax warns without it
    )
    args = ocp.args.PyTreeSave(
        jax.tree_util.tree_map_with_path(hashed, params),
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK), params),
        ocdbt_target_data_file_size=4 * _CHUNK,  # what is held before it is written
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(directory, args=args)
        finally:
            writer.wait()
    return running.value()


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes LazyArrays as Orbax writes numpy arrays, making each when those before are on disk."""

    writing: tuple[Any, ...] = ()

    async def serialize(self, values, infos, args=None):
        args = args or [ocp.SaveArgs() for _ in values]
        # In the order of the tree, which the digest relies on.
        for group in _groups(values):
            self.writing = ()
            for i in group:
                array = values[i].make()
                self.writing += tuple(await super().serialize([array], [infos[i]], [args[i]]))
                del array
            for error in await asyncio.to_thread(self.wait):
                raise error
        return []

    def wait(self) -> list[Exception]:
        """Waits until nothing is being written, so that files can be deleted; returns errors."""
        errors = []
        for commit in self.writing:
            try:
                commit.result()
            except Exception as e:
                errors.append(e)
        return errors


def _groups(arrays: Sequence[Any]) -> Iterator[list[int]]:
    """Yields runs of indices: single arrays, or small ones that are quicker to process together."""
    group, total = [], 0
    for i, array in enumerate(arrays):
        size = math.prod(array.shape) * array.dtype.itemsize
        if group and total + size > _CHUNK:
            yield group
            group, total = [], 0
        group.append(i)
        total += size
    if group:
        yield group


def open_arrays(directory: Path) -> dict[str, Any]:
    """Returns a nested dict of StoredArray; raises ValueError, KeyError or OSError without one."""
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        found = checkpointer.metadata(directory).item_metadata
    if found is None:
        raise FileNotFoundError(f"no parameters in {directory}")
    reader = _Reader(directory)

    def stored(path, leaf):
        keys = tuple(key.key for key in path)
        return StoredArray(reader, keys, tuple(leaf.shape), np.dtype(leaf.dtype))

    tree = jax.tree_util.tree_map_with_path(stored, found.tree)
    arrays = jax.tree.leaves(tree)
    for group in _groups(arrays):
        for i in group:
            reader.groups[arrays[i].keys] = [arrays[j].keys for j in group]
    return tree


@dataclasses.dataclass(frozen=True, eq=False)
class StoredArray:
    """An array on disk, read when it is indexed or turned into a numpy array."""

    reader: "_Reader"
    keys: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """Returns the values."""
        return np.asarray(self.reader.read(self.keys), dtype=dtype)

    def __getitem__(self, index: int) -> np.ndarray:
        """Returns a slice of the values."""
        return self.reader.read(self.keys)[index]


class _Reader:
    """Reads arrays in groups and keeps the last group, whose arrays are requested together."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.groups: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        self.arrays: dict[tuple[str, ...], np.ndarray] = {}

    def read(self, keys: tuple[str, ...]) -> np.ndarray:
        if keys not in self.arrays:
            self.arrays = {}  # let go of one group before the next
            wanted = self.groups[keys]
            how = ocp.RestoreArgs(restore_type=np.ndarray)
            args = ocp.args.PyTreeRestore(
                unflatten_dict(dict.fromkeys(wanted, 0)),
                restore_args=unflatten_dict(dict.fromkeys(wanted, how)),
                partial_restore=True,
            )
            with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
                self.arrays = flatten_dict(checkpointer.restore(self.directory, args=args))
        return self.arrays[keys]


class Digest:
    """A short hash of names, shapes, dtypes and values of arrays, in the order they are added."""

    def __init__(self):
        self.hash = hashlib.blake2b(digest_size=8)

    def add(self, path: Any, leaf: Any) -> None:
        """Adds one array under its path in a tree."""
        array = np.ascontiguousarray(leaf)
        self.hash.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        self.hash.update(array.reshape(-1).view(np.uint8).data)

    def value(self) -> str:
        """Returns the hash."""
        return self.hash.hexdigest()
