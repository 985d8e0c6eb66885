"""How much memory a traced program needs at its fullest moment, estimated without a compiler.

Compilers fuse elementwise operations into what reads or makes their operands, so those take no
memory of their own here; every other result lives from the operation that makes it to the last that
needs it. What a compiler recomputes or lays out with padding is not seen.
"""

import math
from typing import Any, NamedTuple

from jax.extend import core

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
    """Returns the most bytes that the results inside a jaxpr take at once on a device.

    Neither its inputs count nor its outputs, which are donated inputs. `jaxpr` is traced for a
    batch of which a device has `share`, and `doubled` for twice that batch: what does not grow with
    it are gradients and the like, of which a device holds one of `shards` parts.
    """
    sizes: dict[Any, int] = {}
    _measure(jaxpr.jaxpr, doubled.jaxpr, shards, share, sizes)
    return _peak(jaxpr.jaxpr, sizes)


def _measure(jaxpr: Any, doubled: Any, shards: int, share: float, sizes: dict[Any, int]) -> None:
    """Notes the bytes of each result on a device."""
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
        # What is fused reads its operands when its result is read.
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
    """The equations of a jaxpr in order, with those of inlined calls, over numbered values."""

    def __init__(self, bytes_of: dict[Any, int]):
        self.bytes_of = bytes_of
        self.ops: list[_Op] = []
        self.sizes: list[int] = []

    def read(self, jaxpr: Any, numbers: dict[Any, int]) -> list[int]:
        """Adds the equations; returns the numbers of the outputs. -1: an input, or a constant."""

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
    """The jaxprs of an equation's parameters, without constants."""
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
