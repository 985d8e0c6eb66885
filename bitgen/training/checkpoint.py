"""Checkpoints of a run: train state, data position and config, saved and restored together."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from bitgen.errors import UserError, first_line, is_disk_full
from bitgen.runtime.distributed import all_agree, on_first
from bitgen.runtime.logging import log_info

# Settings that may change when a run resumes, because they do not change what a step computes.
FREE = (
    "train.steps",
    "train.log_every",
    "train.preview_every",
    "train.preview_images",
    "train.validate_every",
    "train.fid_every",
    "train.fid_images",
    "train.checkpoint_every",
    "train.keep",  # of older checkpoints
    "train.max_to_keep",
    "train.stuck_after",
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
    "edit",
    "tokenize",
    "reconstruct",
    "evaluate",
    "benchmark",
    "compile_cache",
)


class Checkpoints:
    """The checkpoints of one workdir; every process of a run must make the same calls."""

    def __init__(self, workdir: str | os.PathLike, config: dict[str, Any], keep: int):
        """Opens `workdir/checkpoints`; raises UserError if it holds a run of another config."""
        self.workdir = Path(workdir).absolute()
        self.directory = self.workdir / "checkpoints"
        self.config = config
        self.saving: tuple[int, int] | None = None  # step and bytes
        on_first(self._remove_unfinished)  # Orbax would do it beside the run, at any later time
        handlers: Any = {"state": _handler(), "data": ocp.JsonCheckpointHandler()}
        self.manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
            item_names=("state", "data", "config"),
            item_handlers=handlers,
        )
        for step in reversed(self.manager.all_steps()):
            if (saved := _read_json(self.directory / str(step) / "config")) is not None:
                _check_same_run(Path(workdir), saved, config)
                break

    @property
    def latest(self) -> int | None:
        """The step of the newest complete checkpoint."""
        return self.manager.latest_step()

    def save(self, step: int, state: Any, data_state: Any) -> None:
        """Starts saving; the arrays may be donated as soon as this returns.

        Raises UserError if the disk has too little space, or was full during the previous save;
        what was saved before stays.
        """
        args = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state),
            data=ocp.args.JsonSave(data_state),
            config=ocp.args.JsonSave(self.config),
        )
        self.wait()
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
        self.saving = (step, size)
        # Checked before writing: every thread that fails to write prints a traceback.
        disk = shutil.disk_usage(self.directory)
        if not all_agree(disk.free >= size or disk.total == 0):  # 0: it does not say
            raise self._no_space()
        try:
            self.manager.save(step, args=args)
        except Exception as e:
            raise self._full(e) from None

    def restore(self, state: Any) -> tuple[Any, Any]:
        """Returns the newest state, shaped and sharded like `state`, and the data position.

        It may have been saved on another mesh, or by other processes. A checkpoint that cannot be
        read is moved to `checkpoints_broken`, with one line, and the one before it is used;
        UserError if none is left.
        """
        shapes, broken = jax.tree.map(_abstract, state), []
        for step in sorted(self.manager.all_steps(), reverse=True):
            found, fault = self._read(step, shapes)
            if found is not None:
                for other, why in broken:
                    aside = on_first(lambda other=other: self._move_aside(other))
                    log_info(
                        f"checkpoint {other} cannot be read ({why}): going back to {step}; the "
                        f"broken one is in {aside}"
                    )
                if broken:
                    self.manager.reload()
                return found
            broken.append((step, fault))
        raise UserError(
            f"no checkpoint in {self.directory} can be read: {broken[0][1]}; move that folder away "
            "to begin again"
        )

    def _read(self, step: int, shapes: Any) -> tuple[tuple[Any, Any] | None, str]:
        """Returns state and position, None if a process cannot read its part, and this one's error.

        It does not use Orbax's manager, in which the others would wait for a process that fails.
        """
        folder, found, fault = self.directory / str(step), None, ""
        args = ocp.args.PyTreeRestore(
            shapes, restore_args=ocp.checkpoint_utils.construct_restore_args(shapes)
        )
        try:
            position = _read_json(folder / "data")
            if position is None:
                raise ValueError(f"{folder / 'data'} is damaged")
            if _read_json(folder / "config") is None:
                raise ValueError(f"{folder / 'config'} is damaged")
            found = _handler().restore(epath.Path(folder / "state"), args=args)
            found = jax.block_until_ready(found), position
        except Exception as e:  # Orbax and TensorStore raise many kinds
            fault = f"{type(e).__name__}: {first_line(e)[:200]}"
        if not all_agree(found is not None):
            return None, fault or "another process cannot read its part"
        return found, ""

    def _move_aside(self, step: int) -> str:
        folder = self.workdir / "checkpoints_broken"
        folder.mkdir(exist_ok=True)
        shutil.rmtree(folder / str(step), ignore_errors=True)
        os.replace(self.directory / str(step), folder / str(step))
        return str(folder / str(step))

    def wait(self) -> None:
        """Returns when the current save is on disk; raises UserError if the disk is full."""
        try:
            self.manager.wait_until_finished()
        except Exception as e:
            raise self._full(e) from None
        self.saving = None

    def close(self) -> None:
        """Waits, and closes the directory."""
        try:
            self.manager.close()
        except Exception as e:
            raise self._full(e) from None

    def _full(self, error: Exception) -> Exception:
        """Returns the error to raise for a failed save: one line about a full disk, or itself."""
        if self.saving is None or not is_disk_full(error):
            return error
        self._remove_unfinished()
        return self._no_space()

    def _remove_unfinished(self) -> None:
        """Removes what a killed or failed save has left."""
        for rest in self.directory.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(rest, ignore_errors=True)

    def _no_space(self) -> UserError:
        step, size = self.saving or (0, 0)
        kept = [s for s in self.manager.all_steps(read=True) if s != step]
        free = shutil.disk_usage(self.directory).free
        return UserError(
            f"no space for the checkpoint of step {step} in {self.directory}: it takes about "
            f"{size / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free; "
            + (f"that of step {max(kept)} is kept; " if kept else "")
            + "free some and start the same command again"
        )


def _read_json(folder: Path) -> Any:
    """Returns the JSON that Orbax saved in a folder, None if it is damaged."""
    for name in ("metadata", "process_*.json"):  # grain's handler saved the second
        for file in sorted(folder.glob(name)):
            try:
                return json.loads(file.read_text())
            except (ValueError, OSError):
                return None
    return None


def _handler() -> ocp.PyTreeCheckpointHandler:
    """Returns a handler that saves small replicated arrays from one device, not slices of each."""
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
            "choose another --workdir, or the same settings to resume"
        )


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
