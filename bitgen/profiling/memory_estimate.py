"""Estimates the memory of a training on each device, from shapes alone.

The train state is exact. Gradients and activations are estimated: for BiGR-L, BiGR-XXL and
BitDance-B on 8 TPU v5e, with and without remat, totals were from 13 % below to 26 % above the peak
that the compiler reports. A tenth of the memory is therefore kept free. Mode benchmark's kind
`compile` asks the compiler itself.
"""

import copy
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax.extend import core

from bitgen import build
from bitgen.runtime.devices import GIB
from bitgen.runtime.mesh import abstract_mesh, batch_sharding, check_batch, shards_of_batch
from bitgen.runtime.sharding import RULES, bytes_per_device, is_stacked, path_name, tree_shardings
from bitgen.training.generator_task import GeneratorTask
from bitgen.training.tokenizer_task import TokenizerTask

Parts = dict[str, int]  # name -> bytes on each device

FREE = 0.1  # of a device's memory, for what an estimate does not see


def shapes_task(config: Any) -> Any:
    """Returns the task of a config for shapes only; reads at most model.json.

    Raises UserError for settings that do not fit each other.
    """
    if config.train.task == "generator":
        return GeneratorTask(config, files=False)
    return TokenizerTask(config)


def resident(task: Any, mesh: Any) -> Parts:
    """Returns the bytes that each device holds during the whole training, exactly."""
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
    """Returns an estimate of what a step needs in addition: gradients and activations."""
    shapes, shards = jax.eval_shape(task.init, jax.random.key(0)), shards_of_batch(mesh)
    stage = task.stage(task.config.train.steps)

    rows = task.config.train.batch_size // shards
    # With one row, JAX may drop axes of length one and give another program.
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
    return step_bytes(traced(more), traced(2 * more), holders, 1 / more) + _gathered(
        task, shapes.params, mesh
    )


def _gathered(task: Any, params: Any, mesh: Any) -> int:
    """Returns the bytes of sharded parameters that a device holds gathered for a moment.

    For equal layers these are two of them. The others may all be there at once, because compilers
    fetch them early.
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
    """Returns the parts of a training's memory on `count` devices, which need not be present."""
    task, mesh = shapes_task(config), abstract_mesh(count, **config.mesh)
    check_batch(config.train.batch_size, config.train.accumulate, mesh)
    return {**resident(task, mesh), "step": working(task, mesh)}


def format_parts(parts: Parts) -> str:
    """Returns the parts as one line."""
    each = ", ".join(f"{name} {size / GIB:.3g}" for name, size in parts.items())
    return f"{each}: {sum(parts.values()) / GIB:.3g} GiB a device"


def fits(parts: Parts, memory: int) -> bool:
    """Returns whether training is expected to fit, with some memory left free."""
    return sum(parts.values()) <= (1 - FREE) * memory


@dataclasses.dataclass(frozen=True)
class Advice:
    """Settings with which a config fits."""

    changes: tuple[str, ...]  # --config.KEY=VALUE
    devices: int
    parts: Parts


def advise(config: Any, count: int, memory: int) -> Advice | None:
    """Returns the first settings, of those that do not change results, that are expected to fit.

    In this order: share the state among all devices, recompute layers in the backward pass, split
    the batch into parts, use more devices. None if even 64 times the devices do not suffice.
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


_NAMES = """abs add add_any and atan2 broadcast_in_dim ceil clamp convert_element_type copy copy_p
cos div eq erf erf_inv exp exp2 expand_dims expm1 floor ge gt integer_pow iota is_finite le log
log1p logistic lt max min mul ne neg nextafter not or pow real rem reshape round rsqrt select_n
shift_left shift_right_arithmetic shift_right_logical sign sin slice sqrt square squeeze
stop_gradient sub tanh transpose xor"""

_FUSED = frozenset(_NAMES.split())

# Their equations are those of the program around them.
_INLINED = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call")


class _Op(NamedTuple):
    fused: bool
    reads: list[int]
    makes: list[int]
    inside: int  # bytes at the fullest moment of its own equations


def step_bytes(jaxpr: Any, doubled: Any, shards: int, share: float = 1.0) -> int:
    """Returns the largest number of bytes that the results inside a jaxpr take at once on a device.

    Inputs do not count, nor outputs, which are donated inputs. `jaxpr` is traced for a batch of
    which a device has `share`, and `doubled` for twice that batch. What does not grow with the
    batch, such as gradients, is sharded over `shards` devices.
    """
    sizes: dict[Any, int] = {}
    _measure(jaxpr.jaxpr, doubled.jaxpr, shards, share, sizes)
    return _peak(jaxpr.jaxpr, sizes)


def _measure(jaxpr: Any, doubled: Any, shards: int, share: float, sizes: dict[Any, int]) -> None:
    """Records the bytes of each result on a device."""
    for one, other in zip(jaxpr.eqns, doubled.eqns, strict=True):
        for var, twice in zip(one.outvars, other.outvars, strict=True):
            grown = _bytes(twice.aval) - _bytes(var.aval)
            sizes[var] = int(grown * share) + (_bytes(var.aval) - grown) // shards
        for inner in zip(_inner(one.params), _inner(other.params), strict=True):
            _measure(*inner, shards, share, sizes)


def _peak(jaxpr: Any, bytes_of: dict[Any, int]) -> int:
    program = _Program(bytes_of)
    outputs = set(program.read(jaxpr, dict.fromkeys((*jaxpr.invars, *jaxpr.constvars), -1)))
    outputs.discard(-1)
    ops, sizes = program.ops, program.sizes
    stored = outputs | {value for op in ops if not op.fused for value in (*op.reads, *op.makes)}
    last = dict.fromkeys(outputs, len(ops))
    for i, op in reversed(list(enumerate(ops))):
        # A fused operation reads its operands when its result is read.
        reading = i
        if op.fused and not stored & set(op.makes):
            reading = max((last.get(value, i) for value in op.makes), default=i)
        for value in op.reads:
            last[value] = max(last.get(value, i), reading)
    ends: dict[int, list[int]] = {}
    for value, i in last.items():
        ends.setdefault(i, []).append(value)
    live, peak, held = 0, 0, set()
    for i, op in enumerate(ops):
        for value in op.makes:
            if value in stored and value not in outputs:
                held.add(value)
                live += sizes[value]
        peak = max(peak, live + op.inside)
        for value in (*ends.get(i, ()), *(v for v in op.makes if v not in last)):
            if value in held:
                held.remove(value)
                live -= sizes[value]
    return peak


class _Program:
    """The equations of a jaxpr in order, including those of inlined calls, over numbered values."""

    def __init__(self, bytes_of: dict[Any, int]):
        self.bytes_of = bytes_of
        self.ops: list[_Op] = []
        self.sizes: list[int] = []

    def read(self, jaxpr: Any, numbers: dict[Any, int]) -> list[int]:
        """Adds the equations; returns the numbers of the outputs, -1 for an input or a constant."""

        def number(var):
            return -1 if isinstance(var, core.Literal) else numbers[var]

        for equation in jaxpr.eqns:
            name, inner = equation.primitive.name, _inner(equation.params)
            reads = [number(var) for var in equation.invars]
            if name in _INLINED and len(inner) == 1:
                body = inner[0]
                inside = dict(zip(body.invars, reads, strict=True))
                made = self.read(body, inside | dict.fromkeys(body.constvars, -1))
                numbers.update(zip(equation.outvars, made, strict=True))
                continue
            makes = []
            for var in equation.outvars:
                makes.append(len(self.sizes))
                self.sizes.append(self.bytes_of[var])
            numbers.update(zip(equation.outvars, makes, strict=True))
            inside = max((self._inside(body) for body in inner), default=0)
            self.ops.append(_Op(name in _FUSED, [v for v in reads if v >= 0], makes, inside))
        return [number(var) for var in jaxpr.outvars]

    def _inside(self, body: Any) -> int:
        outputs = {var for var in body.outvars if not isinstance(var, core.Literal)}
        return _peak(body, self.bytes_of) + sum(self.bytes_of.get(var, 0) for var in outputs)


def _inner(params: dict[str, Any]) -> list[Any]:
    """Returns the jaxprs in an equation's parameters, without constants."""
    found = []
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            if isinstance(one, core.ClosedJaxpr):
                found.append(one.jaxpr)
            elif isinstance(one, core.Jaxpr):
                found.append(one)
    return found


def _bytes(aval: Any) -> int:
    if not hasattr(aval, "shape"):
        return 0
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 4)
