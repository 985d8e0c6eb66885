"""Times compiled programs and compares them with the device's measured peaks."""

import dataclasses
import functools
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bitgen.profiling.flops import count_bytes, count_flops
from bitgen.runtime.devices import GIB

PyTree = Any

_MATRIX = {"cpu": 1024, "gpu": 8192, "tpu": 8192}  # side

_COPY = {"cpu": 2**24, "gpu": 2**28, "tpu": 2**28}  # numbers

_LEAST = 0.2  # seconds of a repeat, so that starting a program does not count


@dataclasses.dataclass(frozen=True)
class Peaks:
    """Measured peaks of one device."""

    flops: float  # of a matrix product, operations a second
    bandwidth: float  # of reading and writing memory, bytes a second


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program, and its work on each device."""

    run: Any
    compile_seconds: float
    flops: float  # of matrix products and convolutions
    bytes: float  # the larger of what those move and what the compiler says, loops once
    memory: int  # as the compiler lays it out: arguments, results and temporaries

    def bound(self, peaks: Peaks) -> float:
        """Returns the roofline's time in seconds."""
        return max(self.flops / peaks.flops, self.bytes / peaks.bandwidth)


def compile_program(traced: Any, devices: int) -> Program:
    """Compiles a traced program, and returns it with its operations and bytes per device."""
    started = time.monotonic()
    compiled = traced.lower().compile()
    seconds = time.monotonic() - started
    said = compiled.cost_analysis() or {}
    moved = count_bytes(traced.jaxpr) / devices
    return Program(
        compiled,
        seconds,
        count_flops(traced.jaxpr) / devices,
        max(moved, said.get("bytes accessed", 0.0)),
        compiled_bytes(compiled),
    )


def compiled_bytes(compiled: Any) -> int:
    """Returns the bytes that a device holds while a program runs; 0 if they are unknown."""
    stats = compiled.memory_analysis()
    if stats is None:
        return 0
    alive = stats.argument_size_in_bytes + stats.output_size_in_bytes - stats.alias_size_in_bytes
    return alive + stats.temp_size_in_bytes


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    spread: float  # of the repeats, largest minus smallest, as a share of the median


def time_calls(call: Callable[[], PyTree], repeats: int, at_most: float = math.inf) -> Timing:
    """Returns the time of `call()`, including its result, after one call that is not timed.

    A repeat is as many calls in a row as take a fifth of a second. No repeat starts that would end
    more than `at_most` seconds after the first one started.
    """
    jax.block_until_ready(call())
    begun = time.perf_counter()
    jax.block_until_ready(call())
    first = time.perf_counter() - begun
    calls = max(1, math.ceil(_LEAST / first))
    seconds = [first] if calls == 1 else []
    while len(seconds) < repeats:
        started = time.perf_counter()
        if seconds and started - begun + calls * seconds[-1] > at_most:
            break
        for _ in range(calls):
            result = call()
        jax.block_until_ready(result)
        seconds.append((time.perf_counter() - started) / calls)
    median = statistics.median(seconds)
    return Timing(median, (max(seconds) - min(seconds)) / median)


def measure_peaks(dtype: Any) -> Peaks:
    """Measures the first device's rates of matrix products in a dtype, and of copies."""
    device = jax.devices()[0]
    side, size = _MATRIX.get(device.platform, 1024), _COPY.get(device.platform, 2**24)
    matrix = random_values({"x": jax.ShapeDtypeStruct((side, side), dtype)}, _here(device))["x"]
    array = jnp.zeros((size,), jnp.float32, device=device)
    product = time_calls(functools.partial(jax.jit(jnp.matmul), matrix, matrix), 5)
    copied = time_calls(functools.partial(jax.jit(lambda x: x + 1), array), 5)
    return Peaks(2 * side**3 / product.median, 2 * array.nbytes / copied.median)


def _here(device: Any):
    return jax.sharding.SingleDeviceSharding(device)


def random_values(shapes: PyTree, shardings: PyTree) -> PyTree:
    """Returns small random floats, and zeros of other types; leaves named `var` are positive.

    `shardings` is one sharding, or a tree of them.
    """

    def make(key):
        # Constant matrices would let a GPU clock higher; separate draws would take long to compile.
        base = jax.random.normal(key, (2**16 + 1,)) * 0.02

        def one(path, shape):
            if not jnp.issubdtype(shape.dtype, jnp.floating):
                return jnp.zeros(shape.shape, shape.dtype)
            values = jnp.abs(base) if "var" in str(path[-1:]) else base
            return jnp.resize(values, shape.shape).astype(shape.dtype)

        return jax.tree_util.tree_map_with_path(one, shapes)

    return jax.jit(make, out_shardings=shardings)(jax.random.key(0))


def peak_memory() -> int:
    """Returns this process's peak number of bytes on the first device; 0 if unknown."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def row(
    what: str, images: int, program: Program, timing: Timing, peaks: Peaks, model_flops: float = 0.0
) -> dict[str, Any]:
    """Returns a line of the table.

    `mfu` is the utilisation by `model_flops`, the operations per device without recomputed ones;
    `of_roofline` is the roofline's time over the measured time.
    """
    return {
        "what": what,
        "seconds": timing.median,
        "spread": f"{timing.spread:.1%}",
        "images_per_s": images / timing.median,
        "compile_s": round(program.compile_seconds, 1),
        "tflops_a_device": program.flops / timing.median / 1e12,
        "mfu": f"{(model_flops or program.flops) / timing.median / peaks.flops:.1%}",
        "of_roofline": f"{program.bound(peaks) / timing.median:.1%}",
        "limit": "matrices" if _matrices(program, peaks) else "memory",
        "gib_a_device": program.memory / GIB,
    }


def _matrices(program: Program, peaks: Peaks) -> bool:
    return program.flops / peaks.flops >= program.bytes / peaks.bandwidth
