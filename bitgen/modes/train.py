"""Mode `train`: the training loop, which is the same for every task."""

import contextlib
import time
from pathlib import Path
from typing import Any

import jax

from bitgen import data
from bitgen.errors import UserError, choose
from bitgen.hub import model_directory
from bitgen.profiling.flops import count_flops
from bitgen.profiling.memory_estimate import format_parts, resident
from bitgen.profiling.roofline import compiled_bytes
from bitgen.runtime.devices import GIB
from bitgen.runtime.distributed import barrier, check_mesh, place
from bitgen.runtime.logging import log_info
from bitgen.runtime.mesh import check_batch, make_mesh
from bitgen.runtime.sharding import RULES, tree_shardings
from bitgen.runtime.stop import StopSignal
from bitgen.runtime.watchdog import Watchdog, guard
from bitgen.training import fid, validation
from bitgen.training.checkpoint import Checkpoints
from bitgen.training.generator_task import GeneratorTask
from bitgen.training.hooks import Hooks
from bitgen.training.metrics import Progress, RunLog
from bitgen.training.prefetch import Prefetch
from bitgen.training.state import init_sharded, step_program
from bitgen.training.tokenizer_task import TokenizerTask

TASKS = {"tokenizer": TokenizerTask, "generator": GeneratorTask}


def run(config: Any, workdir: Path) -> None:
    """Trains `config.model` in `workdir`, resuming a run found there; exports `workdir/model`.

    Raises UserError for bad input, and when the loss is no longer finite.
    """
    with (
        guard(workdir, "train", config.train.stuck_after) as watch,
        contextlib.ExitStack() as stack,
    ):
        _run(config, workdir, watch, stack)


def _run(config: Any, workdir: Path, watch: Watchdog, stack: contextlib.ExitStack) -> None:
    # --------------------------------------------------------------------------------- settings
    settings, last = config.train, config.train.steps
    task = choose("task", settings.task, TASKS)(config)
    mesh = make_mesh(**config.mesh)
    _check(config, mesh)
    extractor = fid.check(config, mesh)

    # ------------------------------------------------------------------------------------- data
    batches = data.make_batches(
        config.data,
        batch_size=settings.batch_size,
        seed=config.seed,
        training=True,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    stack.callback(batches.close)
    _check_classes(config, batches)

    # ------------------------------------------------------------------------------------ state
    checkpoints = Checkpoints(workdir, config.to_dict(), settings.max_to_keep)
    stack.callback(checkpoints.close)
    init_key, step_key = jax.random.split(jax.random.key(config.seed))
    log_info(f"memory without a step's own: {format_parts(resident(task, mesh))}")
    state, shardings = init_sharded(task.init, init_key, RULES[config.model.family], mesh)
    frozen = task.frozen()
    frozen = place(frozen, tree_shardings(frozen, (), mesh))
    step = 0
    if checkpoints.latest is not None:
        state, position = checkpoints.restore(state)
        batches.set_state(position)
        step = int(state.step)
        log_info(f"resuming {workdir} at step {step}")
    elif config.init_from:
        state = task.start_from(state, model_directory.load(config.init_from, settings.task))
        log_info(f"starting from {config.init_from}")
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params["model"]))
    log_info(f"training {config.model.family}: {size / 1e6:.1f} M parameters, {mesh.size} devices")

    # ------------------------------------------------------------------------------------ hooks
    prefetch = Prefetch(batches, mesh, settings.preview_images if settings.preview_every else 0)
    log = RunLog(workdir)
    stack.callback(log.close)
    hooks = Hooks(task, workdir, prefetch, checkpoints, log, watch, saved=step)
    if extractor is not None and step < last:
        hooks.fid = fid.start(config, task, mesh, extractor, workdir)
    if settings.validate_every:
        hooks.validate = validation.start(config, task, mesh, frozen)

    # ------------------------------------------------------------------------------------- loop
    program = step_program(task, shardings, mesh, step_key)
    compiled: dict[bool, Any] = {}
    stop, progress, leaving = StopSignal(), None, step >= last
    while not leaving:
        started = time.monotonic()
        watch.report(f"waiting for the data of step {step + 1}")
        batch = stop.mark(prefetch.next(), mesh)
        waited = time.monotonic() - started
        stage = task.stage(step)
        if stage not in compiled:
            compiled[stage], flops = _compile(program, (state, frozen, batch, stage), step, watch)
            progress = Progress(step, last, settings.batch_size, flops)
        assert progress is not None
        if stop.before_a_step(nothing_new=step == hooks.saved):
            break
        watch.report(f"step {step + 1}")
        state, metrics = compiled[stage](state, frozen, batch)
        step += 1
        progress.waited += waited
        leaving = stop.after(metrics) or step == last
        hooks.after(step, state, metrics, progress, leaving)

    # -------------------------------------------------------------------------------------- end
    checkpoints.wait()
    if stop.received and hooks.saved:
        log_info(f"stopped by a signal: saved step {hooks.saved}; the same command resumes there")
    elif stop.received:
        log_info("stopped by a signal before the first step: the same command starts again")
    elif not compiled:
        hooks.export_if_missing(step, state)
        log_info(f"nothing to do: {workdir} is at step {step} of {last}")
    else:
        log_info(f"done: {workdir / 'model'} is the averaged model after {step} steps")


def _compile(program: Any, arguments: tuple, step: int, watch: Watchdog) -> tuple[Any, int]:
    """Compiles the training step on all processes, and returns it with its operations."""
    started = time.monotonic()
    watch.report("compiling the training step", slow=True)
    traced = program.trace(*arguments)
    compiled = traced.lower().compile()
    seconds, size = time.monotonic() - started, compiled_bytes(compiled) / GIB
    watch.report("waiting until all have compiled", slow=True)
    barrier(f"compiled at step {step}")
    log_info(f"compiled the training step in {seconds:.1f} s: {size:.3g} GiB a device in all")
    return compiled, count_flops(traced.jaxpr)


def _check(config: Any, mesh: Any) -> None:
    check_mesh(mesh)
    check_batch(config.train.batch_size, config.train.accumulate, mesh)
    if config.train.freeze and config.train.task != "tokenizer":
        raise UserError("config.train.freeze is for tokenizers alone; leave it empty")
    if config.train.task == "tokenizer" and config.data.image_size != config.model.image_size:
        raise UserError(
            f"config.data.image_size={config.data.image_size} and "
            f"config.model.image_size={config.model.image_size} differ"
        )


def _check_classes(config: Any, batches: Any) -> None:
    if config.train.task == "generator" and batches.num_classes > config.model.num_classes:
        raise UserError(
            f"the data has {batches.num_classes} classes, the generator "
            f"{config.model.num_classes}; set --config.model.num_classes={batches.num_classes}"
        )
