"""The device mesh, and where arrays live on it."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bitgen.errors import UserError

AXES = ("data", "fsdp", "tensor")
BATCH = P(("data", "fsdp"))
Rules = Sequence[tuple[str, P]]


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """Returns a mesh with axes data, fsdp and tensor; -1 takes the devices that are left.

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    fixed = int(np.prod([size for size in sizes.values() if size != -1]))
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(len(devices) // fixed, 1)
    if int(np.prod(list(sizes.values()))) != len(devices):
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(
            f"mesh {asked} does not fit {len(devices)} devices; change config.mesh.* (-1: the rest)"
        )
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(tuple(sizes[axis] for axis in AXES), AXES, types, devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, P())


def tree_shardings(shapes: Any, rules: Rules, mesh: Mesh) -> Any:
    """Returns a sharding for each leaf: the spec of the first rule whose pattern is in its path."""

    def one(path, leaf):
        name = "/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, P())

    return jax.tree_util.tree_map_with_path(one, shapes)


def shards_of_batch(mesh: Mesh) -> int:
    """Returns into how many parts a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def even_batch(size: int, mesh: Mesh) -> int:
    """Returns the batch size, rounded up to one that splits over the mesh."""
    shards = shards_of_batch(mesh)
    return -(-size // shards) * shards


def to_device(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global batch made of each process's rows, sharded over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
