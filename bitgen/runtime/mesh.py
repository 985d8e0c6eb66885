"""The device mesh and the placement of batches on it."""

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bitgen.errors import UserError

AXES = ("data", "fsdp", "tensor")

BATCH = P(("data", "fsdp"))


def make_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Any = None) -> Mesh:
    """Returns a mesh with axes data, fsdp and tensor; -1 takes the remaining devices.

    Raises UserError if the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(len(devices), {"data": data, "fsdp": fsdp, "tensor": tensor})
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(sizes, AXES, types, devices=devices)


def abstract_mesh(count: int, data: int = -1, fsdp: int = 1, tensor: int = 1) -> AbstractMesh:
    """Returns a mesh of that many devices for shapes only; without a number, `make_mesh`."""
    sizes = _sizes(count, {"data": data, "fsdp": fsdp, "tensor": tensor})
    return AbstractMesh(sizes, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def _sizes(count: int, sizes: dict[str, int]) -> tuple[int, ...]:
    fixed = math.prod(size for size in sizes.values() if size != -1)
    for axis, size in sizes.items():
        if size == -1:
            sizes[axis] = max(count // fixed, 1)
    if math.prod(sizes.values()) != count:
        asked = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
        raise UserError(
            f"mesh {asked} does not fit {count} devices; change config.mesh.* (-1: the rest)"
        )
    return tuple(sizes[axis] for axis in AXES)


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Returns the sharding of a batch: its first axis over data and fsdp."""
    return NamedSharding(mesh, BATCH)


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds completely."""
    return NamedSharding(mesh, P())


def shards_of_batch(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of parts into which a batch is split."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_batch(size: int, parts: int, mesh: Mesh | AbstractMesh) -> None:
    """Raises UserError unless a training batch splits evenly over the mesh."""
    shards = shards_of_batch(mesh)
    if parts < 1:
        raise UserError(f"config.train.accumulate is a number of parts, 1 or more, got {parts}")
    if size % (shards * parts):
        each = f" in {parts} parts each (config.train.accumulate)" if parts > 1 else ""
        raise UserError(
            f"config.train.batch_size={size} does not split over {shards} devices{each}; "
            f"choose a multiple of {shards * parts}"
        )


def round_up_batch(size: int, mesh: Mesh) -> int:
    """Returns the batch size, rounded up to a multiple that splits over the mesh."""
    shards = shards_of_batch(mesh)
    return -(-size // shards) * shards


def to_device(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Returns the global batch made of every process's rows, sharded over the mesh."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in batch.items()
    }
