"""Compiling for devices that are not here, which says whether a program fits them."""

import collections
import os
import re
import time
from typing import Any

import jax

from bitgen.devices import GIB
from bitgen.errors import UserError, first_line
from bitgen.logging import say
from bitgen.measure import compiled_bytes

_COLLECTIVES = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def devices(topology: str) -> list[Any]:
    """Returns the devices of a topology: v5e:2x4 (TPUs), cpu:8, or '' for those here.

    Raises UserError if jax knows no such topology or lacks what compiles for it.
    """
    if not topology:
        return jax.devices()
    if topology.startswith("cpu:") and topology[4:].isdigit():
        return _cpus(int(topology[4:]))
    from jax.experimental import topologies

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
            "v5p:2x2x2 or cpu:8"
        ) from None


def _cpus(count: int) -> list[Any]:
    found = jax.devices("cpu")
    if len(found) < count:
        raise UserError(
            f"there are {len(found)} CPU devices, not {count}: set "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return found[:count]


def compile_row(what: str, traced: Any, mesh: Any) -> dict[str, Any]:
    """Returns what the compiler says of a traced program: whether it fits, memory, collectives."""
    started = time.monotonic()
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        if "RESOURCE_EXHAUSTED" not in str(e):
            raise
        say(f"{what}: {first_line(e)}")
        return _row(what, mesh, time.monotonic() - started, "no", 0.0, "")
    seconds = time.monotonic() - started
    calls = collections.Counter(_COLLECTIVES.findall(compiled.as_text()))
    said = ", ".join(f"{count} {name}" for name, count in sorted(calls.items()))
    return _row(what, mesh, seconds, "yes", compiled_bytes(compiled) / GIB, said)


def _row(what: str, mesh: Any, seconds: float, fits: str, size: float, said: str) -> dict[str, Any]:
    device = mesh.devices.flat[0].device_kind
    return {
        "what": what,
        "on": f"{mesh.size} x {device}",
        "compile_s": round(seconds, 1),
        "compiles": fits,
        "gib_a_device": size,
        "collectives": said or "none",
    }
