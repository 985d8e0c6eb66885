"""Checkpoints of a run: train state, data position and config, saved and restored together."""

import json
import os
from pathlib import Path
from typing import Any

import grain.checkpoint
import jax
import orbax.checkpoint as ocp

from bitgen.errors import UserError

# Settings that may change when a run goes on: they do not alter what a step computes.
FREE = (
    "train.steps",
    "train.log_every",
    "train.preview_every",
    "train.preview_images",
    "train.fid_every",
    "train.fid_images",
    "train.checkpoint_every",
    "train.keep",
    "data.path",
    "data.threads",
    "data.workers",
    "data.prefetch",
    "data.max_broken_share",
    "tokenizer",
    "generator",
    "loss.perceptual_weights",
    "mesh",
    "sampler",
    "sample",
    "tokenize",
    "reconstruct",
    "evaluate",
)


class Checkpoints:
    """The checkpoints of one workdir."""

    def __init__(self, workdir: str | os.PathLike, config: dict[str, Any], keep: int):
        """Opens `workdir/checkpoints`; raises UserError if it holds a run of another config."""
        self.directory = Path(workdir).absolute() / "checkpoints"
        self.config = config
        handlers: Any = {"state": _handler(), "data": grain.checkpoint.CheckpointHandler()}
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            item_names=("state", "data", "config"),
            item_handlers=handlers,
        )
        if self.latest is not None:
            args = ocp.args.Composite(config=ocp.args.JsonRestore())
            saved = self.manager.restore(self.latest, args=args)["config"]
            _check_same_run(Path(workdir), saved, config)

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Starts saving; the arrays may be donated as soon as this returns."""
        self.manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(state),
                data=grain.checkpoint.CheckpointSave(_DataPosition(data_state)),
                config=ocp.args.JsonSave(self.config),
            ),
        )

    def restore(self, state: Any) -> tuple[Any, Any]:
        """Returns the newest state, shaped and sharded like `state`, and the data position."""
        position = _DataPosition(None)
        shapes = jax.tree.map(_abstract, state)
        restored = self.manager.restore(
            self.latest,
            args=ocp.args.Composite(
                state=ocp.args.PyTreeRestore(
                    shapes, ocp.checkpoint_utils.construct_restore_args(shapes)
                ),
                data=grain.checkpoint.CheckpointRestore(position),
            ),
        )
        return restored["state"], position.state

    def wait(self) -> None:
        """Returns when the save under way is on disk."""
        self.manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the directory."""
        self.manager.close()


class _DataPosition:
    """What grain's handler saves and restores: the position after the last batch trained on.

    The iterator itself is ahead of it by what is prefetched.
    """

    def __init__(self, state: Any):
        self.state = state

    def get_state(self) -> bytes:
        return json.dumps(self.state).encode()

    def set_state(self, state: bytes) -> None:
        self.state = json.loads(state)

    def start_prefetch(self) -> None:
        pass


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Saves a small replicated array from one device: slices of it from each cost more."""
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=1 << 20)
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry)


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _check_same_run(workdir: Path, saved: dict[str, Any], config: dict[str, Any]) -> None:
    old, new = _flatten(saved), _flatten(config)
    changed = [
        f"{key} is {old.get(key)!r} there and {new.get(key)!r} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
        and not any(key == free or key.startswith(free + ".") for free in FREE)
    ]
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"{workdir} holds a run of a different config: {'; '.join(changed[:3])}{more}; "
            "choose another --workdir, or the same settings to go on"
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
