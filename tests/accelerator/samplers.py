"""What the device reaches at most, and how near the samplers come."""

import functools
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitgen.modes import benchmark
from bitgen.profiling.compile_report import kernel_stats
from bitgen.profiling.roofline import (
    Peaks,
    compile_program,
    measure_peaks,
    random_values,
    row,
    time_calls,
)
from bitgen.runtime import devices
from bitgen.runtime.mesh import batch_sharding, make_mesh
from bitgen.samplers.images import image_keys

from .models import sampling
from .part import READY, Context

GROWING = 1.1  # by less, throughput has stopped growing
SECONDS = 10.0  # for the repeats of a batch
PATIENCE = 60.0  # seconds after which no further program is compiled


# -------------------------------------------------------------------------------------- peaks
def peaks(context: Context) -> Iterator[Any]:
    """Products in two types, and copies, beside what the maker says."""
    device = jax.devices()[0]
    known = devices.by_kind(device.device_kind)
    yield {"what": f"{jax.device_count()} x {device.device_kind}, jax {jax.__version__}"}
    yield READY
    for name, dtype in (("bfloat16", jnp.bfloat16), ("float32", jnp.float32)):
        found = measure_peaks(dtype)
        if name == "bfloat16":
            (context.scratch / "peaks.json").write_text(json.dumps(vars(found)))
        about = {"what": f"{name} products and float32 copies"}
        about |= {"tflops": found.flops / 1e12, "gb_per_s": found.bandwidth / 1e9}
        if known and name == "bfloat16":
            about["of_the_makers_flops"] = f"{found.flops / known.flops:.1%}"
            about["of_the_makers_bandwidth"] = f"{found.bandwidth / known.bandwidth:.1%}"
        yield about


def measured_peaks(context: Context) -> Peaks:
    """Returns those of bfloat16, measured here if the part `peaks` did not run."""
    path = context.scratch / "peaks.json"
    if not path.exists():
        path.write_text(json.dumps(vars(measure_peaks(jnp.bfloat16))))
    return Peaks(**json.loads(path.read_text()))


# ----------------------------------------------------------------------------------- samplers
def sampler(name: str, batches: Sequence[int], context: Context) -> Iterator[Any]:
    """From labels to images at the authors' settings, until throughput stops growing."""
    programs, begun = {}, time.monotonic()
    for size in (1, 2) if context.rehearse else batches:
        if time.monotonic() - begun > PATIENCE:
            print(f"batch {size} and larger: no time to compile", flush=True)
            break
        generator, program, shapes = compiled(sampling(name, context), size)
        programs[size] = program
        print(f"batch {size}: compiled in {program.compile_seconds:.1f} s", flush=True)
    kernels = kernel_stats(programs[1].run.as_text()).kernels
    yield READY
    limits = measured_peaks(context)
    params = random_values(shapes, jax.tree.map(lambda s: s.sharding, shapes))
    best = 0.0
    for size, program in programs.items():
        call = calls(generator, program, params, size)
        try:
            timing = time_calls(call, 3, SECONDS)
        except jax.errors.JaxRuntimeError as e:
            if "RESOURCE_EXHAUSTED" not in str(e):
                raise
            yield {"what": f"batch {size}", "stopped": "it does not fit the memory"}
            return
        found = row(f"batch {size}", size, program, timing, limits)
        if size == 1:
            found |= {"kernels": kernels, "us_a_kernel": timing.median / max(kernels, 1) * 1e6}
        yield found
        throughput = size / timing.median
        if throughput < GROWING * best:
            return
        best = throughput
    yield {"what": f"batch {size}", "stopped": "the largest tried: throughput was still growing"}


def compiled(config: Any, size: int) -> tuple[Any, Any, Any]:
    """Returns the generator, its compiled sampler of `size` images, and both models' shapes."""
    mesh = make_mesh(devices=jax.devices()[:1])
    generator, traced, shapes = benchmark.traced_sampler(config, mesh, size)
    return generator, compile_program(traced, 1), shapes


def calls(generator: Any, program: Any, params: Any, size: int) -> Any:
    """Returns f() that draws a batch."""
    labels = jnp.arange(size) % generator.num_classes
    keys = image_keys(0, np.arange(size))
    sharding = batch_sharding(make_mesh(devices=jax.devices()[:1]))
    return functools.partial(program.run, *params, *jax.device_put((labels, keys), sharding))
