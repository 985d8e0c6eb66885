"""Compiles for devices that are not present, and reports whether a program fits them."""

import collections
import dataclasses
import math
import os
import re
import time
from typing import Any

import jax
from jax.experimental import topologies

from bitgen.errors import UserError, first_line
from bitgen.profiling.flops import count_bytes, count_flops
from bitgen.profiling.roofline import compiled_bytes
from bitgen.runtime.devices import GIB, by_kind, by_name
from bitgen.runtime.logging import log_info

# Further properties of GPUs that the compiler needs, from the makers' pages: compute capability,
# multiprocessors, 32-bit lanes per multiprocessor, KiB of its shared memory, MiB of cache, GHz.
_GPUS = {
    "A100 80GB": (8, 108, 64, 164, 40, 1.41),
    "H100": (9, 132, 128, 228, 50, 1.98),
    "H200": (9, 132, 128, 228, 50, 1.98),
}

_COLLECTIVES = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def devices(topology: str) -> list[Any]:
    """Returns the devices of a topology: v5e:2x4 (TPUs), h100:8, cpu:8, or '' for those present.

    Raises UserError if jax knows no such topology or lacks its compiler.
    """
    if not topology:
        return jax.devices()
    if topology.startswith("cpu:") and topology[4:].isdigit():
        return _cpus(int(topology[4:]))
    card, _, count = topology.partition(":")
    for name in _GPUS:
        if name.split()[0].lower() == card.lower() and (count or "1").isdigit():
            return _gpus(topology, name, int(count or 1))
    # Without it, the library asks the network which TPU this is.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    # Of v4 and v5p, jax sees the two cores of a chip as one device.
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except (RuntimeError, ValueError, AssertionError, jax.errors.JaxRuntimeError) as e:
        if "not installed" in str(e):
            raise UserError(
                f"compiling for {topology} needs the TPU compiler, which needs no TPU: "
                "pip install 'jax[tpu]', and set JAX_PLATFORMS=cpu where there is none"
            ) from None
        raise UserError(
            f"jax knows no topology {topology!r} ({first_line(e)}); write v5e:2x4, v6e:4x4, "
            "v5p:2x2x2, a100:8, h100:8, h200:8 or cpu:8"
        ) from None


def _cpus(count: int) -> list[Any]:
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(
            f"there are {len(found)} CPU devices, not {count}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return found[:count]


def _gpus(topology: str, name: str, count: int) -> list[Any]:
    card = by_name(name)
    major, cores, lanes, shared, cache, clock = _GPUS[name]
    target = f"""
        gpu_device_info {{
          cuda_compute_capability {{ major: {major} minor: 0 }}
          core_count: {cores} fpus_per_core: {lanes} clock_rate_ghz: {clock}
          memory_bandwidth: {card.bandwidth:.0f} device_memory_size: {card.memory}
          l2_cache_size: {cache * 2**20}
          shared_memory_per_core: {shared * 1024} shared_memory_per_block: {48 * 1024}
          shared_memory_per_block_optin: {(shared - 1) * 1024}
          threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
          registers_per_core_limit: 65536 registers_per_block_limit: 65536
          block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
        }}
        platform_name: "CUDA"
        dnn_version_info {{ major: 9 minor: 10 }}
        runtime_version {{ major: 12 minor: 9 }}
        device_description_str: "{card.kinds[0]}"
    """
    try:
        found = topologies.get_topology_desc(
            "", "cuda", target_config=target, topology=f"1x1x{count}"
        )
    except NotImplementedError:
        raise UserError(
            f"compiling for {topology} needs jax's CUDA compiler, which needs no GPU: "
            "pip install 'jax[cuda13]', and set JAX_PLATFORMS=cpu where there is none"
        ) from None
    return list(found.devices)


def compile_report_row(what: str, traced: Any, mesh: Any) -> dict[str, Any]:
    """Returns what the compiler tells of a traced program: whether it fits, memory, collectives.

    And, per device, the kernels that it starts, the GB that products and other kernels move, and
    the roofline's time at the maker's peaks.
    """
    device = mesh.devices.flat[0]
    known = by_kind(device.device_kind)
    # The compiler picks these kernels by trying them, which it cannot do without the device.
    absent = device.platform == "gpu" and device not in jax.devices()
    options = {"xla_gpu_enable_triton_gemm": False} if absent else {}
    row: dict[str, Any] = {"what": what, "on": f"{mesh.size} x {device.device_kind}"}
    started, compiled = time.monotonic(), None
    try:
        compiled = traced.lower().compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        log_info(f"{what}: {first_line(e)}")
    row["compile_s"] = round(time.monotonic() - started, 1)
    if compiled is None:
        return {**row, "compiles": "no", "gib_a_device": 0.0, "collectives": "none"}
    size = compiled_bytes(compiled)
    row["compiles"] = "no" if known and size > known.memory else "yes"
    row["gib_a_device"] = size / GIB
    text = compiled.as_text()
    moved = kernel_stats(text)
    row["kernels"] = moved.kernels
    row |= {"products_gb": moved.products / 1e9, "others_gb": moved.others / 1e9}
    calls = collections.Counter(_COLLECTIVES.findall(text))
    said = ", ".join(f"{count} {name}" for name, count in sorted(calls.items()))
    row["collectives"] = said or "none"
    if known:
        flops, least = (count(traced.jaxpr) / mesh.size for count in (count_flops, count_bytes))
        bound = max(flops / known.flops, least / known.bandwidth)
        row |= {"tflop_a_device": flops / 1e12, "at_least_ms": bound * 1e3}
    return row


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
class KernelStats:
    """What a program does on one device; loops count as often as they run, if that is known."""

    kernels: int = 0
    products: int = 0  # bytes of matrix products, convolutions and library calls
    others: int = 0  # bytes of all else

    def __add__(self, other: "KernelStats") -> "KernelStats":
        return KernelStats(*map(sum, zip(_values(self), _values(other), strict=True)))

    def __mul__(self, times: int) -> "KernelStats":
        return KernelStats(*(times * value for value in _values(self)))


def _values(traffic: KernelStats) -> tuple[int, ...]:
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
        """Returns the computation that the attribute `word` names."""
        found = re.search(rf"\b{word}=%?([\w.\-]+)", self.text)
        return found.group(1) if found else ""


def kernel_stats(text: str) -> KernelStats:
    """Returns the kernels and bytes of a compiled program, given as `compiled.as_text()`."""
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
    """Returns the text before the closing bracket."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if not depth:
            return rest[:i]
    return rest


def _of_computation(name: str, computations: dict[str, list[_Instruction]]) -> KernelStats:
    total, shapes = KernelStats(), {one.name: one.shape for one in computations.get(name, ())}
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
            total += max(ran, key=lambda t: sum(_values(t)), default=KernelStats())
        else:
            inner = computations.get(one.called("calls"), []) if one.op == "fusion" else []
            if inner:
                moved = _of_fusion(inner)
            else:
                # The workspace of a library call is no traffic.
                made = _WORKSPACE.sub("", one.shape) if one.op == "custom-call" else one.shape
                moved = sum(map(_bytes, (made, *(shapes.get(x, "") for x in one.operands))))
            product = one.op in _PRODUCTS or any(x.op in _PRODUCTS for x in inner)
            total += KernelStats(1, moved, 0) if product else KernelStats(1, 0, moved)
    return total


def _of_fusion(inner: list[_Instruction]) -> int:
    """Returns the bytes of a fused kernel, which reads only the slices it takes and writes in
    place.
    """
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
