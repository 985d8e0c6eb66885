"""Where the time goes: the kernels that a program starts, the longest, and the gaps between."""

import collections
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax

from bitgen.modes import benchmark
from bitgen.profiling.roofline import compile_program, random_values, time_calls

from . import training
from .models import sampling
from .part import READY, Context
from .samplers import calls, compiled

LONGEST = 20
# Lines of a GPU that the profiler derives from those of its streams.
DERIVED = ("XLA ", "Framework ", "Steps", "Source", "Launch Stats", "TensorFlow ")
# A CPU's threads also say when they begin, wait and run a whole loop.
NO_KERNEL = re.compile(r"::|^end: |^while|^call")


class Event(NamedTuple):
    """A kernel that ran; nanoseconds."""

    start: float
    end: float
    name: str


def sampler(name: str, context: Context) -> Iterator[Any]:
    """One image, in fewer steps, without graphs of kernels: its time, and its profile."""
    generator, program, shapes = compiled(sampling(name, context, short=True), 1)
    yield READY
    params = random_values(shapes, jax.tree.map(lambda s: s.sharding, shapes))
    yield from report("one image, fewer steps, no graphs", calls(generator, program, params, 1))


def step(name: str, batch: int, unrolled: bool, context: Context) -> Iterator[Any]:
    """A training step, layers unrolled where they can be."""
    mesh = training.one_device()
    c = training.settings(name, batch, context, True if unrolled else None)
    traced, (_, _, shapes) = benchmark.traced_step(c, mesh)
    program, start = compile_program(traced, 1), training.starter(c, mesh)
    yield READY
    state, frozen = start()
    batch = random_values(shapes, jax.tree.map(lambda s: s.sharding, shapes))

    def call():
        nonlocal state
        state, metrics = program.run(state, frozen, batch)
        return metrics

    yield from report("a step, no graphs", call)


def report(what: str, call: Callable[[], Any]) -> Iterator[dict[str, Any]]:
    """Yields the time of a call, what ran in it, and its longest kernels."""
    timing = time_calls(call, 3, 5.0)
    events = events_of(call)
    if not events:
        yield {"what": what, "seconds": timing.median, "left_out": "the profile has no kernels"}
        return
    busy, span = _busy(events), max(e.end for e in events) - events[0].start
    yield {
        "what": what,
        "seconds": timing.median,
        "profiled_seconds": span / 1e9,
        "kernels": len(events),
        "busy": f"{busy / span:.1%}",
        "us_a_kernel": busy / len(events) / 1e3,
        "us_between": (span - busy) / len(events) / 1e3,
    }
    seconds, counts = collections.Counter(), collections.Counter()
    for event in events:
        seconds[event.name] += (event.end - event.start) / 1e9
        counts[event.name] += 1
    total = sum(seconds.values())
    for place, (name, took) in enumerate(seconds.most_common(LONGEST), start=1):
        yield {
            "what": f"kernel {place}",
            "seconds": took,
            "kernels": counts[name],
            "share": f"{took / total:.1%}",
            "name": name[:100],
        }


def _busy(events: list[Event]) -> float:
    """-> nanoseconds in which at least one of the events, by their starts, runs."""
    busy, until = 0.0, 0.0
    for event in events:
        busy += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return busy


def events_of(call: Callable[[], Any]) -> list[Event]:
    """Returns the kernels that a call runs on the first device, by their starts."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, profiler_options=options):
            jax.block_until_ready(call())
        found = [
            event
            for path in Path(folder).rglob("*.xplane.pb")
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes
            for line in plane.lines
            for event in _kernels(plane.name, line)
        ]
    return sorted(found)


def _kernels(plane: str, line: Any) -> Iterator[Event]:
    """Yields what ran on a line of the profile, if it is one of the first device's."""
    platform, ours = jax.default_backend(), plane.startswith("/device:") and plane.endswith(":0")
    if platform == "cpu":
        ours = line.name.startswith("tf_XLA")
    elif platform == "tpu":
        ours &= line.name == "XLA Ops"
    else:
        ours &= not line.name.startswith(DERIVED)
    for event in line.events if ours else ():
        if platform != "cpu" or not NO_KERNEL.search(event.name):
            yield Event(event.start_ns, event.start_ns + event.duration_ns, event.name)
