"""Training steps at real size, fed from files: stored bits for generators, JPEGs for tokenizers."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from helpers import small

from bitgen import data
from bitgen.data.packed import PackedWriter
from bitgen.modes import benchmark
from bitgen.profiling import memory_estimate
from bitgen.profiling.roofline import compile_program, random_values
from bitgen.runtime import devices
from bitgen.runtime.mesh import make_mesh, replicated
from bitgen.runtime.sharding import RULES, tree_shardings
from bitgen.training.prefetch import Prefetch

from .models import config
from .part import READY, Context
from .samplers import PATIENCE, measured_peaks

WARM, SECONDS, MOST = 3, 6.0, 50  # steps not timed; for those that are; steps at most


def step(name: str, batch: int, unrolled: bool, context: Context) -> Iterator[Any]:
    """A step of a shipped config in bfloat16, as it is and, if `unrolled`, with layers unrolled."""
    mesh, programs, begun = one_device(), {}, time.monotonic()
    for unroll in (True, False) if unrolled else (None,):
        if time.monotonic() - begun > PATIENCE:
            print(f"no time to compile{_words(unroll)}", flush=True)
            break
        c = settings(name, batch, context, unroll)
        program = compile_program(benchmark.traced_step(c, mesh)[0], 1)
        flops = benchmark.model_flops(c, mesh) or program.flops
        programs[_words(unroll)] = c, program, flops
        print(f"compiled{_words(unroll)} in {program.compile_seconds:.1f} s", flush=True)
    write_data(c)
    start = starter(c, mesh)
    yield READY
    peaks, known = measured_peaks(context), devices.by_kind(jax.devices()[0].device_kind)
    for words, (c, program, flops) in programs.items():
        state, frozen = start()
        seconds, waited, metrics = _timed(c, mesh, program, state, frozen)
        finite = all(bool(np.all(np.isfinite(x))) for x in jax.tree.leaves(metrics))
        size = c.train.batch_size
        row = {
            "what": f"step of {size} images{words}",
            "holds": finite,
            "seconds": seconds,
            "images_per_s": size / seconds,
            "mfu": f"{flops / seconds / peaks.flops:.1%}",
            "data_wait": f"{waited:.1%}",
            "compile_s": round(program.compile_seconds, 1),
            "gib_a_device": program.memory / devices.GIB,
            "loss": float(metrics["loss"]),
        }
        if known:
            row["mfu_of_the_makers_peak"] = f"{flops / seconds / known.flops:.1%}"
        del state, frozen  # before the next takes as much
        yield row


def one_device() -> Any:
    """Returns the mesh of the first device."""
    return make_mesh(devices=jax.devices()[:1])


def settings(name: str, batch: int, context: Context, unroll: bool | None) -> Any:
    """Returns a config of configs/ with data of its own below the scratch folder."""
    c = config(name)
    c.train.accumulate = 1
    c.train.batch_size = batch
    c.model.dtype = "bfloat16"
    if unroll is not None:
        c.model.unroll = unroll
    if context.rehearse:
        small.shrink_model(c)
    generator = c.train.task == "generator"
    c.data.source = "bits" if generator else "folder"
    c.data.holdout = 0.0
    c.data.path = str(context.scratch / f"{name.replace(':', '_')}-data")
    c.tokenizer, c.init_from = "", ""
    return c


def _words(unroll: bool | None) -> str:
    return {None: "", True: ", layers unrolled", False: ", layers in a loop"}[unroll]


def write_data(c: Any) -> None:
    """Writes eight batches of random bits, or as many smooth pictures, where the config reads."""
    rng, count, path = np.random.default_rng(0), 8 * c.train.batch_size, Path(c.data.path)
    if c.data.source == "bits":
        shape = (count, 1, *c.model.grid, -(-c.model.bits // 8))
        classes = c.model.num_classes
        meta = {"grid": c.model.grid, "bits": c.model.bits, "views": 1, "count": count}
        meta |= {"num_classes": classes, "class_names": [str(i) for i in range(classes)]}
        meta |= {"examples_per_shard": count, "tokenizer": {}, "source": {}}
        writer = PackedWriter(path, meta)
        writer.add(rng.integers(0, 256, shape, np.uint8), rng.integers(0, classes, count))
        writer.finish()
        return
    from PIL import Image

    (path / "pictures").mkdir(parents=True)
    size = c.data.image_size * 3 // 2
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
        picture = coarse.resize((size, size), Image.Resampling.BICUBIC)
        picture.save(path / "pictures" / f"{i:05d}.jpg")


def starter(c: Any, mesh: Any) -> Callable[[], tuple[Any, Any]]:
    """Returns f() -> the state before the first step, and frozen models with random weights.

    It is compiled; only what f returns lies on the device.
    """
    task, key = memory_estimate.shapes_task(c), jax.random.key(0)
    shardings = tree_shardings(jax.eval_shape(task.init, key), RULES[c.model.family], mesh)
    init = jax.jit(task.init, out_shardings=shardings).lower(key).compile()
    return lambda: (init(key), random_values(task.frozen_shapes(), replicated(mesh)))


def _timed(c: Any, mesh: Any, program: Any, state: Any, frozen: Any) -> tuple[Any, ...]:
    """-> seconds a step, the share of them that waited for data, the last metrics."""
    batches = data.make_batches(
        c.data, batch_size=c.train.batch_size, seed=0, training=True, process_index=0,
        process_count=1,
    )  # fmt: skip
    prefetch, metrics, begun, waited = Prefetch(batches, mesh, 0), {}, 0.0, 0.0
    names = memory_estimate.shapes_task(c).batch_shapes()  # a tokenizer's step takes no labels
    try:
        for done in range(1, WARM + MOST + 1):
            waiting = time.perf_counter()
            batch = {name: rows for name, rows in prefetch.next().items() if name in names}
            waited += time.perf_counter() - waiting
            before = metrics
            state, metrics = program.run(state, frozen, batch)
            jax.block_until_ready(before)  # as in training, at most a step ahead of the device
            if done == WARM:
                jax.block_until_ready(metrics)
                begun, waited = time.perf_counter(), 0.0
            elif done > WARM and time.perf_counter() - begun > SECONDS:
                break
        metrics = jax.device_get(metrics)
        seconds = time.perf_counter() - begun
    finally:
        batches.close()
    return seconds / (done - WARM), waited / seconds, metrics
