"""What training takes on each device, from shapes alone, before anything is allocated.

What lies there all the time is exact. Gradients and activations are estimated: for BiGR-L, BiGR-XXL
and BitDance-B on 8 TPU v5e, with remat and without, totals were from 13 % below to 26 % above the
peak by the compiler. A tenth of the memory is kept free for that, and mode benchmark's kind
`compile` asks the compiler itself.
"""

import copy
import dataclasses
import math
from typing import Any

import jax

from bitgen import build, liveness
from bitgen.devices import GIB
from bitgen.mesh import abstract_mesh, batch_sharding, check_batch, shards_of_batch
from bitgen.sharding import RULES, bytes_per_device, is_stacked, path_name, tree_shardings
from bitgen.tasks.generator import GeneratorTask
from bitgen.tasks.tokenizer import TokenizerTask

Parts = dict[str, int]  # name -> bytes on each device
FREE = 0.1  # of a device's memory, for what an estimate does not see


def shapes_task(config: Any) -> Any:
    """Returns the task of a config for shapes alone; reads model.json at most.

    Raises UserError for settings that do not fit each other.
    """
    if config.train.task == "generator":
        return GeneratorTask(config, files=False)
    return TokenizerTask(config)


def resident(task: Any, mesh: Any) -> Parts:
    """Returns what lies on each device through the whole training: of shapes, exactly."""
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    places = tree_shardings(shapes, RULES[task.config.model.family], mesh)
    frozen, batch = task.frozen_shapes(), task.batch_shapes()

    def held(name: str) -> Parts:
        of_one = {
            what: bytes_per_device(getattr(shapes, what)[name], getattr(places, what)[name])
            for what in ("params", "opt")
        }
        return {"parameters": of_one["params"], "optimiser": of_one["opt"]}

    parts = held("model")
    parts["average"] = bytes_per_device(shapes.ema, places.ema)
    others = [sum(held(name).values()) for name in shapes.params if name != "model"]
    if others:
        parts["discriminator"] = sum(others) + bytes_per_device(shapes.stats, places.stats)
    if frozen:
        parts["frozen"] = bytes_per_device(frozen, tree_shardings(frozen, (), mesh))
    parts["batch"] = bytes_per_device(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))
    return parts


def working(task: Any, mesh: Any) -> int:
    """Returns an estimate of what a step takes beyond that: gradients and activations."""
    shapes, shards = jax.eval_shape(task.init, jax.random.key(0)), shards_of_batch(mesh)
    stage = task.stage(task.config.train.steps)

    rows = task.config.train.batch_size // shards
    # Of one row, a program may be another one, without axes of length one.
    more = 2 if rows == task.config.train.accumulate else 1

    def traced(times: int):
        batch = jax.tree.map(
            lambda s: jax.ShapeDtypeStruct((rows * times, *s.shape[1:]), s.dtype),
            task.batch_shapes(),
        )

        def step(state, frozen, batch, key):
            return task.step(state, frozen, batch, key, stage)

        key = jax.eval_shape(lambda: jax.random.key(0))
        return jax.make_jaxpr(step)(shapes, task.frozen_shapes(), batch, key)

    holders = mesh.shape["fsdp"] * mesh.shape["tensor"]
    return liveness.step_bytes(traced(more), traced(2 * more), holders, 1 / more) + _gathered(
        task, shapes.params, mesh
    )


def _gathered(task: Any, params: Any, mesh: Any) -> int:
    """Of split parameters, what a device has whole for a moment: two layers where they are alike.

    The others may be there all at once, as compilers fetch them early.
    """
    if mesh.shape["fsdp"] == 1:
        return 0
    total = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        layers = leaf.shape[0] if is_stacked(path_name(path), leaf.shape) else 1
        total += leaf.size * min(layers, 2) // layers
    width = build.DTYPES[task.config.model.dtype](0).dtype.itemsize
    return total * width // mesh.shape["tensor"]


def estimate(config: Any, count: int) -> Parts:
    """Returns the parts of training a config on `count` devices that need not be there."""
    task, mesh = shapes_task(config), abstract_mesh(count, **config.mesh)
    check_batch(config.train.batch_size, config.train.accumulate, mesh)
    return {**resident(task, mesh), "step": working(task, mesh)}


def format_parts(parts: Parts) -> str:
    """Returns the parts in one line."""
    each = ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items())
    return f"{each}: {sum(parts.values()) / GIB:.3g} GiB a device"


def fits(parts: Parts, memory: int) -> bool:
    """Returns whether training is expected to fit with some memory left free."""
    return sum(parts.values()) <= (1 - FREE) * memory


@dataclasses.dataclass(frozen=True)
class Advice:
    """Settings that make a config fit."""

    changes: tuple[str, ...]  # --config.KEY=VALUE
    devices: int
    parts: Parts


def advise(config: Any, count: int, memory: int) -> Advice | None:
    """Returns the first settings, of those that do not change results, that are expected to fit.

    In this order: all devices share the state, layers are computed again in the backward pass, the
    batch goes in parts, and at last more devices. None if even 64 times the devices do not do.
    """
    config, changes = copy.deepcopy(config), {}
    with config.unlocked():
        for devices in (count * 2**i for i in range(7)):
            for change in _candidates(config, devices):
                config.update_from_flattened_dict(change)
                changes |= change
                if config.train.batch_size % (devices * config.train.accumulate):
                    continue
                task, mesh = shapes_task(config), abstract_mesh(devices, **config.mesh)
                parts = resident(task, mesh)
                if not fits(parts, memory):
                    continue  # before the step is traced, which takes longer
                parts["step"] = working(task, mesh)
                if fits(parts, memory):
                    flags = tuple(f"--config.{key}={value}" for key, value in changes.items())
                    return Advice(flags, devices, parts)
    return None


def _candidates(config: Any, devices: int):
    tensor = config.mesh.tensor
    if devices % tensor == 0 and devices // tensor > 1:
        yield {"mesh.data": 1, "mesh.fsdp": devices // tensor}
    if "remat" in config.model and not config.model.remat:
        yield {"model.remat": True}
    rows = math.gcd(config.train.batch_size, 2**20) // devices
    parts = max(config.train.accumulate, 1)
    while parts * 2 <= rows:
        parts *= 2
        yield {"train.accumulate": parts}
