"""Sharding of parameters over the mesh: rules for each family, and one general rule.

`tensor` splits what a rule names: the heads and hidden features of transformers, so that a block
needs one sum over devices (Megatron, arXiv 1909.08053). `fsdp` splits the largest remaining axis
that divides evenly (ZeRO, arXiv 1910.02054), preferably one that a TPU need not pad. Moments and
averages have the paths of their parameters, so the same rules apply to them.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from bitgen.runtime.mesh import shards_of_batch

# (pattern in the path, spec of the last axes); the first match counts.
Rules = Sequence[tuple[str, P]]

_BLOCKS: Rules = (
    (r"attention/qkv/kernel$", P(None, None, "tensor", None)),  # [d, 3, heads, head_dim]
    (r"attention/out/kernel$", P("tensor", None, None)),  # [heads, head_dim, d]
    (r"mlp/(gate|up)/kernel$", P(None, "tensor")),  # [d, hidden]
    (r"(mlp|bits_in)/gate_up/kernel$", P(None, None, "tensor")),  # [d, 2, hidden]
    (r"mlp/down/kernel$|(mlp|bits_in)/out/kernel$", P("tensor", None)),  # [hidden, d]
)

# A tokenizer's arrays lie whole along `tensor`: XLA's partitioner gives wrong gradients for
# convolutions whose channels and batch are split over three axes (jax 0.10).
_WHOLE: Rules = ()

RULES: dict[str, Rules] = {
    "bigr": (
        *_BLOCKS,
        (r"denoiser/blocks_\d+/mlp_in/kernel$", P(None, "tensor")),
        (r"denoiser/blocks_\d+/mlp_out/kernel$", P("tensor", None)),
    ),
    "bitdance": _BLOCKS,
    "binary_ae": _WHOLE,
    "bitvae": _WHOLE,
    "conv_ae": _WHOLE,
    "dcae": _WHOLE,
    "gfq_ae": _WHOLE,
}

# Layers that are scanned over lie behind one another on the first axis, which is never split.
_STACKED = re.compile(r"(^|/)(layers|stage_\d+)/")

# Arrays of fewer numbers (of one layer) are whole on each device: moving them costs more.
SMALL = 2**14

# TPUs keep so many numbers of one axis together, and fill up what is not a multiple.
_LANES = 128


def tree_shardings(shapes: Any, rules: Rules, mesh: Mesh | AbstractMesh) -> Any:
    """Returns the sharding of each leaf of a tree of arrays or shapes."""

    def one(path, leaf):
        return NamedSharding(mesh, leaf_spec(path_name(path), leaf.shape, rules, mesh))

    return jax.tree_util.tree_map_with_path(one, shapes)


def leaf_spec(name: str, shape: tuple[int, ...], rules: Rules, mesh: Mesh | AbstractMesh) -> P:
    """Returns the spec of a leaf by its path; an axis that does not divide evenly is not split."""
    first = int(is_stacked(name, shape))
    if math.prod(shape[first:]) < SMALL:
        return P()
    spec: list[str | None] = [None] * len(shape)
    split = mesh.shape["tensor"]
    if split > 1:
        rule = next((spec for pattern, spec in rules if re.search(pattern, name)), P())
        for axis, who in enumerate(rule, start=len(shape) - len(rule)):
            if who and shape[axis] % split == 0:
                spec[axis] = who
    shards = mesh.shape["fsdp"]
    free = [i for i in range(first, len(shape)) if not spec[i] and shape[i] % shards == 0]
    if free and shards > 1:

        def rank(axis):
            parts = [size // shards if i == axis else size for i, size in enumerate(shape)]
            return any(size % _LANES == 0 for size in parts[first:]), shape[axis]

        spec[max(free, key=rank)] = "fsdp"
    while spec and spec[-1] is None:
        spec.pop()
    return P(*spec)


def is_stacked(name: str, shape: tuple[int, ...]) -> bool:
    """Returns whether the first axis of a leaf counts layers."""
    return len(shape) > 1 and bool(_STACKED.search(name))


def path_name(path: Sequence[Any]) -> str:
    """Returns the path of a leaf in a state: opt/model/0/mu/layers/mlp/up/kernel."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def bytes_per_device(shapes: Any, shardings: Any) -> int:
    """Returns the bytes that a device holds of a tree of arrays or shapes."""
    leaves = zip(jax.tree.leaves(shapes), jax.tree.leaves(shardings), strict=True)
    return sum(
        math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, sharding in leaves
    )


def whole_leaves(shapes: Any, shardings: Any) -> list[str]:
    """Returns the paths of large leaves that every device holds completely."""
    found = []
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(shardings), strict=True
    ):
        name = path_name(path)
        rest = leaf.shape[int(is_stacked(name, leaf.shape)) :]
        if math.prod(rest) >= SMALL and sharding.is_fully_replicated:
            found.append(name)
    return found


@contextlib.contextmanager
def batch_on(mesh: Mesh) -> Iterator[None]:
    """Keeps the outputs of modules sharded by batch while a step is traced in this context.

    Otherwise, parameters sharded by `fsdp` lead the compiler to shard activations by features, with
    the whole batch on each device. The compiler chooses the other axes.
    """
    shards = shards_of_batch(mesh)
    if mesh.shape["fsdp"] == mesh.shape["tensor"] == 1:
        yield
        return

    def constrain(x):
        if not isinstance(x, jax.Array) or x.ndim < 2 or x.shape[0] % shards:
            return x
        rest = (P.UNCONSTRAINED,) * (x.ndim - 1)
        spec = P(("data", "fsdp"), *rest)
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def intercept(call, args, kwargs, context):
        result = call(*args, **kwargs)
        return jax.tree.map(constrain, result) if context.method_name == "__call__" else result

    with nn.intercept_methods(intercept):
        yield
