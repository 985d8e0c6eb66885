"""Mode `benchmark`: speed and memory of a config, compared with the device's peaks.

Nothing is downloaded or read except model.json files: weights are random, which does not change the
times, and released models are built from their sizes.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitgen import __version__, build
from bitgen.errors import UserError, choose
from bitgen.files import write_json
from bitgen.hub import model_directory
from bitgen.images.pixels import from_uint8, to_uint8
from bitgen.profiling import compile_report, memory_estimate
from bitgen.profiling.flops import count_flops
from bitgen.profiling.roofline import (
    Peaks,
    compile_program,
    measure_peaks,
    peak_memory,
    random_values,
    row,
    time_calls,
)
from bitgen.runtime import devices
from bitgen.runtime.distributed import check_single
from bitgen.runtime.logging import format_table, log_info
from bitgen.runtime.mesh import (
    batch_sharding,
    check_batch,
    make_mesh,
    replicated,
    round_up_batch,
    to_device,
)
from bitgen.runtime.sharding import RULES, tree_shardings
from bitgen.samplers.images import image_keys, image_sampler, make_plan, prepare
from bitgen.training.state import step_program

Rows = list[dict[str, Any]]


def run(config: Any, workdir: Path) -> None:
    """Writes `workdir/benchmark.json` and prints it as a table.

    `config.benchmark.kind` chooses what is measured. Raises UserError for what cannot be measured,
    such as training with a config without a model.
    """
    check_single("benchmark")
    asked = str(config.benchmark.kind).replace(" ", "").split(",")
    every = asked == ["all"]
    kinds = [name for name in KINDS if name != "compile"] if every else asked
    report: dict[str, Any] = {
        "bitgen": __version__,
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "config": config.to_dict(),
        "results": {},
    }
    for name in kinds:
        measure = choose("kind of benchmark", name, KINDS)
        try:
            found = measure(config)
        except _NotHere as e:
            if not every:
                raise UserError(f"config.benchmark.kind={name}: {e}") from None
            log_info(f"skipped {name}: {e}")
            continue
        report["results"][name] = found
    report["peak_bytes"] = peak_memory()  # of the process, where the device counts them
    _finish(workdir, report)


class _NotHere(Exception):
    """Raised when the config lacks something that a kind of measurement needs."""


def _finish(workdir: Path, report: dict[str, Any]) -> None:
    write_json(workdir / "benchmark.json", report, default=str)
    rows = [line for found in report["results"].values() for line in found.get("rows", ())]
    if rows:
        print(format_table(rows))
    log_info(f"wrote {workdir / 'benchmark.json'}")


# ---------------------------------------------------------------------- memory
def _memory(config: Any) -> dict[str, Any]:
    """Estimates memory from shapes, for devices that need not be present."""
    if not config.train.task:
        raise _NotHere("the config trains nothing")
    settings = config.benchmark
    count = settings.devices or jax.device_count()
    if settings.device:
        name, limit = settings.device, devices.by_name(settings.device).memory
    else:
        name, limit = jax.devices()[0].device_kind, devices.memory_of(jax.devices()[0])
    parts = memory_estimate.estimate(config, count)
    found: dict[str, Any] = {"device": name, "devices": count, "bytes": parts}
    log_info(f"memory, by shapes: {memory_estimate.format_parts(parts)}")
    if limit is None:
        log_info(f"the memory of {name} is not known: set config.benchmark.device")
        return found
    found |= {"memory": limit, "fits": memory_estimate.fits(parts, limit)}
    what = f"{count} x {name} with {limit / devices.GIB:.0f} GiB"
    if found["fits"]:
        log_info(f"it fits {what}")
        return found
    advice = memory_estimate.advise(config, count, limit)
    if advice is None:
        log_info(f"it does not fit {what}, nor 64 times as many: lower config.train.batch_size")
        return found
    found["advice"] = {"changes": advice.changes, "devices": advice.devices, "bytes": advice.parts}
    more = "" if advice.devices == count else f" on {advice.devices} devices"
    total = sum(advice.parts.values()) / devices.GIB
    log_info(f"it does not fit {what}; {' '.join(advice.changes)}{more} takes {total:.1f} GiB")
    return found


# --------------------------------------------------------------------- training
def _train(config: Any) -> dict[str, Any]:
    if not config.train.task:
        raise _NotHere("the config trains nothing")
    mesh, count = make_mesh(**config.mesh), jax.device_count()
    traced, arguments = traced_step(config, mesh)
    program = compile_program(traced, count)
    log_info(f"compiled the training step in {program.compile_seconds:.1f} s")
    state, frozen, batch = arguments
    shardings = jax.tree.map(lambda s: s.sharding, (state, frozen))
    state, frozen = random_values((state, frozen), shardings)
    # No step has been done yet, and moments squared are not negative.
    state = state.replace(opt=jax.tree.map(jnp.zeros_like, state.opt))
    batch = to_device(_random_batch(config, batch), mesh)

    def call():
        nonlocal state
        state, metrics = program.run(state, frozen, batch)
        return metrics

    timing = time_calls(call, config.benchmark.repeats)
    peaks, images = _peaks(config.model.dtype), config.train.batch_size
    flops = model_flops(config, mesh) / count
    what = f"training step, {images} images"
    return {"peaks": vars(peaks), "rows": [row(what, images, program, timing, peaks, flops)]}


def traced_step(config: Any, mesh: Any) -> tuple[Any, tuple[Any, Any, Any]]:
    """Returns the traced training step, and the placed shapes of state, frozen models and batch.

    It is the last step of the training, in which a discriminator takes part.
    """
    check_batch(config.train.batch_size, config.train.accumulate, mesh)
    task = memory_estimate.shapes_task(config)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    rules = RULES[config.model.family]
    state, frozen = (
        _placed(tree, tree_shardings(tree, which, mesh))
        for tree, which in ((shapes, rules), (task.frozen_shapes(), ()))
    )
    batch = task.batch_shapes()
    batch = _placed(batch, jax.tree.map(lambda _: batch_sharding(mesh), batch))
    shardings = jax.tree.map(lambda s: s.sharding, state)
    program = step_program(task, shardings, mesh, jax.random.key(1))
    traced = program.trace(state, frozen, batch, task.stage(config.train.steps))
    return traced, (state, frozen, batch)


def _placed(shapes: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, shardings
    )


def model_flops(config: Any, mesh: Any) -> float:
    """Returns the operations of a step without those recomputed for gradients.

    0 stands for all operations of the program.
    """
    generator = config.train.task == "generator"
    if not generator and not config.model.get("remat", False):
        return 0.0  # the program's own
    plain = config.copy_and_resolve_references()
    with plain.ignore_type():
        plain.model.remat = None if generator else False
    return count_flops(traced_step(plain, mesh)[0].jaxpr)


def _random_batch(config: Any, shapes: dict[str, Any]) -> dict[str, np.ndarray]:
    rng, top = np.random.default_rng(0), {"label": config.model.get("num_classes", 1)}
    return {
        name: rng.integers(0, top.get(name, 256), s.shape, s.dtype) for name, s in shapes.items()
    }


@functools.lru_cache(maxsize=2)
def _peaks(dtype: str) -> Peaks:
    peaks = measure_peaks(build.DTYPES[dtype])
    flops, bandwidth = f"{peaks.flops / 1e12:.3g} TFLOP/s", f"{peaks.bandwidth / 1e9:.3g} GB/s"
    log_info(f"measured of a device: {dtype} products {flops}, memory {bandwidth}")
    return peaks


# -------------------------------------------------------------------- tokenizer
def _tokenizer(config: Any) -> dict[str, Any]:
    module, mesh = module_of(config, "tokenizer"), make_mesh(**config.mesh)
    size, everywhere = round_up_batch(config.tokenize.batch_size, mesh), replicated(mesh)
    shapes = build.param_shapes(module)
    params = random_values(shapes, jax.tree.map(lambda _: everywhere, shapes))
    side = module.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (size, side, side, 3), np.uint8)
    images = to_device({"image": pixels}, mesh)["image"]
    sharding = batch_sharding(mesh)

    def encode(params, images):
        return module.apply({"params": params}, from_uint8(images), method="encode")

    def decode(params, bits):
        return to_uint8(module.apply({"params": params}, bits, method="decode"))

    rows, value, dtype = [], images, _dtype_of(module)
    for name, function in (("encode", encode), ("decode", decode)):
        traced = jax.jit(function, out_shardings=sharding).trace(params, value)
        program = compile_program(traced, mesh.size)
        call = functools.partial(program.run, params, value)
        timing = time_calls(call, config.benchmark.repeats)
        rows.append(row(f"{name} {size} images", size, program, timing, _peaks(dtype)))
        value = call()
    return {"rows": rows}


def module_of(config: Any, kind: str) -> Any:
    """Returns the module that samples or encodes, from the config's model or its directory."""
    dtype = choose("dtype", config.sample.dtype, build.DTYPES)
    if config.train.task == kind and not config[kind]:
        return build.module_from_config(kind, config.model)[0].clone(dtype=dtype)
    if not config[kind]:
        raise _NotHere(f"config.{kind} is empty")
    try:
        return model_directory.describe(config[kind], kind).clone(dtype=dtype)
    except UserError as e:
        raise _NotHere(str(e)) from None


def _dtype_of(module: Any) -> str:
    return next(name for name, dtype in build.DTYPES.items() if dtype == module.dtype)


# --------------------------------------------------------------------- sampling
def _sample(config: Any) -> dict[str, Any]:
    """Measures one image on one device, and batches on all devices."""
    batches = _batches(str(config.benchmark.batches)) or [1, config.sample.batch_size]
    rows = []
    for batch in batches:
        mesh = make_mesh(devices=jax.devices()[:1]) if batch == 1 else make_mesh(**config.mesh)
        size = round_up_batch(batch, mesh)
        generator, traced, shapes = traced_sampler(config, mesh, size)
        program = compile_program(traced, mesh.size)
        params = random_values(shapes, jax.tree.map(lambda s: s.sharding, shapes))
        labels = jnp.arange(size) % generator.num_classes
        keys = image_keys(config.seed, np.arange(size))
        inputs = jax.device_put((labels, keys), batch_sharding(mesh))
        call = functools.partial(program.run, *params, *inputs)
        timing = time_calls(call, config.benchmark.repeats)
        peaks = _peaks(_dtype_of(generator))
        rows.append(row(f"sample {size} images", size, program, timing, peaks))
    return {"rows": rows}


def _batches(text: str) -> list[int]:
    words = text.replace(" ", "").split(",") if text else []
    if not all(word.isdecimal() and int(word) for word in words):
        raise UserError(f"config.benchmark.batches={text}: numbers of images, such as 1,4,16")
    return [int(word) for word in words]


def traced_sampler(config: Any, mesh: Any, size: int) -> tuple[Any, Any, tuple[Any, Any]]:
    """Returns the generator, the traced program from labels to images, and its models' shapes."""
    if config.train.task == "tokenizer":
        raise _NotHere("the config has no generator")
    generator, tokenizer = module_of(config, "generator"), module_of(config, "tokenizer")
    check = functools.partial(model_directory.Model, params={}, info={})
    model_directory.check_fit(
        check(generator, path=config.generator or "of config.model"),
        check(tokenizer, path=config.tokenizer),
    )
    plan = make_plan(generator, config.sampler)
    sampler = image_sampler(generator, tokenizer, plan, mesh, config.sample.decode_batch)
    platform = mesh.devices.flat[0].platform
    params = build.param_shapes(generator)
    prepared = jax.eval_shape(lambda p: prepare(generator, p, platform), params)
    shapes = (prepared, build.param_shapes(tokenizer))
    shapes = _placed(shapes, jax.tree.map(lambda _: replicated(mesh), shapes))
    labels = jax.ShapeDtypeStruct((size,), jnp.int32, sharding=batch_sharding(mesh))
    keys = jax.eval_shape(lambda: image_keys(0, np.arange(size)))
    keys = jax.ShapeDtypeStruct(keys.shape, keys.dtype, sharding=batch_sharding(mesh))
    return generator, jax.jit(sampler).trace(*shapes, labels, keys), shapes


# ---------------------------------------------------------------------- compile
def _compile(config: Any) -> dict[str, Any]:
    """Compiles ahead of time, for devices that need not be present."""
    mesh = make_mesh(**config.mesh, devices=compile_report.devices(config.benchmark.topology))
    programs: dict[str, Callable[[], Any]] = {}
    if config.train.task:
        programs["training step"] = lambda: traced_step(config, mesh)[0]
    else:
        size = round_up_batch(config.sample.batch_size, mesh)
        programs[f"sample {size} images"] = lambda: traced_sampler(config, mesh, size)[1]
    rows = [
        compile_report.compile_report_row(what, make(), mesh) for what, make in programs.items()
    ]
    return {"topology": config.benchmark.topology, "rows": rows}


KINDS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "memory": _memory,
    "tokenizer": _tokenizer,
    "train": _train,
    "sample": _sample,
    "compile": _compile,
}
