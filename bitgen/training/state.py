"""The train state, and the compiled step that updates it."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from bitgen import build
from bitgen.errors import UserError
from bitgen.runtime.distributed import place
from bitgen.runtime.logging import log_info
from bitgen.runtime.mesh import replicated
from bitgen.runtime.sharding import Rules, batch_on, tree_shardings, whole_leaves

PyTree = Any


@flax.struct.dataclass
class TrainState:
    """Everything that a checkpoint needs; networks by name, always with `model`."""

    step: jax.Array
    params: dict[str, PyTree]
    opt: dict[str, PyTree]
    ema: PyTree  # of params['model']
    stats: dict[str, PyTree]  # what moves without a gradient, outside of `params`


def ema_update(ema: PyTree, params: PyTree, step: jax.Array, decay: float, every: int) -> PyTree:
    """Returns the moving average after a step; it is updated once in `every` steps."""
    moved = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)
    if every == 1:
        return moved
    move = (step + 1) % every == 0
    return jax.tree.map(lambda e, m: jnp.where(move, m, e), ema, moved)


def with_leaves(tree: PyTree, leaves: PyTree) -> PyTree:
    """Returns nested dicts in which the leaves of `leaves` replace those of the same paths."""
    if not isinstance(leaves, Mapping):
        return leaves.astype(tree.dtype)
    return {**tree, **{name: with_leaves(tree[name], part) for name, part in leaves.items()}}


def with_params(state: TrainState, params: PyTree, what: str) -> TrainState:
    """Returns the state with the model's parameters, and their average, replaced by `params`.

    Raises UserError if they are those of another model; `what` names their origin.
    """
    if faults := build.shape_faults(params, state.params["model"]):
        raise UserError(
            f"{what} does not have the sizes of config.model: {faults[0]} "
            f"({len(faults)} differ); set config.model as its model.json says"
        )
    placed = jax.tree.map(
        lambda old, new: place(jnp.asarray(new, old.dtype), old.sharding),
        state.params["model"],
        params,
    )
    return state.replace(
        params={**state.params, "model": placed}, ema=jax.tree.map(jnp.copy, placed)
    )


def init_sharded(init: Any, key: jax.Array, rules: Rules, mesh: Mesh) -> tuple[Any, Any]:
    """Returns init(key), computed with its final shardings, and the shardings."""
    shapes = jax.eval_shape(init, key)
    shardings = tree_shardings(shapes, rules, mesh)
    if mesh.shape["fsdp"] > 1 and (whole := whole_leaves(shapes, shardings)):
        log_info(
            f"{len(whole)} arrays have no axis that config.mesh.fsdp={mesh.shape['fsdp']} divides "
            f"and are replicated: {whole[0]}, ..."
        )
    return jax.jit(init, out_shardings=shardings)(key), shardings


def step_program(task: Any, shardings: Any, mesh: Mesh, key: jax.Array) -> Any:
    """Returns the jitted f(state, frozen, batch, stage) -> (state, metrics) of a task.

    The state is donated; `stage` is static. Step i has the key folded with i. If the batch has
    flags `stop`, the metrics tell whether any is set.
    """

    def train_step(state: TrainState, frozen: PyTree, batch: PyTree, stage: bool):
        flags = {"stop": jnp.any(batch["stop"])} if "stop" in batch else {}
        batch = {name: rows for name, rows in batch.items() if name != "stop"}
        with batch_on(mesh):
            key_now = jax.random.fold_in(key, state.step)
            state, metrics = task.step(state, frozen, batch, key_now, stage)
        return state, {**metrics, **flags}

    return jax.jit(
        train_step,
        static_argnums=3,
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
    )
