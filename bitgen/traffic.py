"""Kernels that a compiled program starts and bytes that they move, from the compiler's text.

For devices that are not here: what there is to time, before it can be timed.
"""

import collections
import dataclasses
import math
import re

_BYTES = {"pred": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_BYTES |= {"s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8}
_ARRAY = re.compile(rf"\b({'|'.join(_BYTES)})\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(
    r"(ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)$"
)
_WORKSPACE = re.compile(r"\b[su]8\[\d+\]")
_NO_KERNELS = {"parameter", "get-tuple-element", "tuple", "bitcast", "constant", "after-all"}
_PRODUCTS = {"dot", "convolution", "custom-call"}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a program does on one device; loops as often as they run, if that is known."""

    kernels: int = 0
    products: int = 0  # bytes of matrix products, convolutions and library calls
    others: int = 0  # bytes of all else

    def __add__(self, other: "Traffic") -> "Traffic":
        return Traffic(*map(sum, zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: int) -> "Traffic":
        return Traffic(*(times * value for value in _values(self)))


def _values(traffic: Traffic) -> tuple[int, ...]:
    return dataclasses.astuple(traffic)


@dataclasses.dataclass(frozen=True)
class _Instruction:
    root: bool
    name: str
    shape: str
    op: str
    operands: list[str]
    text: str

    def called(self, word: str) -> str:
        """The computation that it calls by a word."""
        found = re.search(rf"\b{word}=%?([\w.\-]+)", self.text)
        return found.group(1) if found else ""


def traffic_of(text: str) -> Traffic:
    """Returns the traffic of a compiled program, given as `compiled.as_text()`."""
    computations, entry = _parse(text)
    return _of_computation(entry, computations)


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    computations: dict[str, list[_Instruction]] = {}
    name = entry = ""
    for line in text.splitlines():
        if begin := _COMPUTATION.match(line):
            name = begin.group(2)
            computations[name] = []
            entry = name if begin.group(1) else entry
        elif found := _INSTRUCTION.match(line.strip()):
            root, own, shape, op, rest = found.groups()
            operands = re.findall(r"%([\w.\-]+)", _in_brackets(rest))
            computations[name].append(_Instruction(bool(root), own, shape, op, operands, rest))
    return computations, entry


def _in_brackets(rest: str) -> str:
    """What comes before the bracket that closes."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:i]
    return rest


def _of_computation(name: str, computations: dict[str, list[_Instruction]]) -> Traffic:
    total, shapes = Traffic(), {one.name: one.shape for one in computations.get(name, ())}
    for one in computations.get(name, ()):
        if one.op in _NO_KERNELS:
            continue
        if one.op == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', one.text)
            times = int(trips.group(1)) if trips else 1
            total += _of_computation(one.called("body"), computations) * times
        elif one.op == "call":
            total += _of_computation(one.called("to_apply"), computations)
        elif one.op == "conditional":
            branches = re.findall(r"%([\w.\-]+)", one.text.split("branch_computations=")[-1])
            ran = [_of_computation(b, computations) for b in branches if b in computations]
            total += max(ran, key=lambda t: sum(_values(t)), default=Traffic())
        else:
            inner = computations.get(one.called("calls"), []) if one.op == "fusion" else []
            if inner:
                moved = _of_fusion(inner)
            else:
                # What a library works in is no traffic.
                made = _WORKSPACE.sub("", one.shape) if one.op == "custom-call" else one.shape
                moved = sum(map(_bytes, (made, *(shapes.get(x, "") for x in one.operands))))
            product = one.op in _PRODUCTS or any(x.op in _PRODUCTS for x in inner)
            total += Traffic(1, moved, 0) if product else Traffic(1, 0, moved)
    return total


def _of_fusion(inner: list[_Instruction]) -> int:
    """Bytes of a fused kernel, which reads only a slice of what it slices and writes in place."""
    by_name, users = {one.name: one for one in inner}, collections.defaultdict(list)
    for one in inner:
        for place, operand in enumerate(one.operands):
            users[operand].append((one, place))

    def uses(name):
        for one, place in users[name]:
            yield from uses(one.name) if one.op in ("bitcast", "copy") else [(one, place)]

    total = 0
    for one in inner:
        if one.op == "parameter":
            used = list(uses(one.name))
            if used and all(x.op == "dynamic-slice" and not place for x, place in used):
                total += sum(_bytes(x.shape) for x, _ in used)
            elif not all(x.op == "dynamic-update-slice" and not place for x, place in used):
                total += _bytes(one.shape)
        if one.root:
            for name in one.operands if one.op == "tuple" else [one.name]:
                written = by_name[name]
                while written.op == "bitcast" and written.operands[0] in by_name:
                    written = by_name[written.operands[0]]
                if written.op == "dynamic-update-slice":
                    written = by_name[written.operands[1]]
                total += _bytes(written.shape)
    return total


def _bytes(shape: str) -> int:
    arrays = _ARRAY.findall(shape)
    return sum(
        _BYTES[dtype] * math.prod(map(int, dims.split(",")) if dims else ())
        for dtype, dims in arrays
    )
