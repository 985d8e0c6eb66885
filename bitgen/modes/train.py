"""The training loop, for every task."""

import collections
import contextlib
import dataclasses
import functools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitgen import data
from bitgen.errors import UserError, choose
from bitgen.hub import model_directory
from bitgen.profiling.flops import count_flops
from bitgen.profiling.memory_estimate import format_parts, resident
from bitgen.profiling.roofline import compiled_bytes
from bitgen.runtime.devices import GIB
from bitgen.runtime.distributed import barrier, check_mesh, gather, on_first, place
from bitgen.runtime.logging import log_info
from bitgen.runtime.mesh import check_batch, make_mesh, to_device
from bitgen.runtime.sharding import RULES, tree_shardings
from bitgen.runtime.stop import StopSignal
from bitgen.runtime.watchdog import Watchdog, guard
from bitgen.training import fid as scheduled
from bitgen.training.checkpoint import Checkpoints
from bitgen.training.generator_task import GeneratorTask
from bitgen.training.metrics import Progress, RunLog, merged
from bitgen.training.state import TrainState, init_sharded, step_program
from bitgen.training.tokenizer_task import TokenizerTask
from bitgen.training.validation import Validation

TASKS = {"tokenizer": TokenizerTask, "generator": GeneratorTask}


def run(config: Any, workdir: Path) -> None:
    """Trains `config.model` in `workdir`, resuming what is there, and exports `workdir/model`.

    Raises UserError for bad input, and when the loss is no longer finite.
    """
    with (
        guard(workdir, "train", config.train.stuck_after) as watch,
        contextlib.ExitStack() as stack,
    ):
        _run(config, workdir, watch, stack)


def _run(config: Any, workdir: Path, watch: Watchdog, stack: contextlib.ExitStack) -> None:
    # ---------------------------------------------------------------- settings
    settings, batch_size, last = config.train, config.train.batch_size, config.train.steps
    task = choose("task", settings.task, TASKS)(config)
    mesh = make_mesh(**config.mesh)
    _check(config, mesh)
    extractor = scheduled.check(config, mesh)

    # -------------------------------------------------------------------- data
    batches = data.make_batches(
        config.data,
        batch_size=batch_size,
        seed=config.seed,
        training=True,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )
    stack.callback(batches.close)
    _check_classes(config, batches)
    info = {**task.info, "class_names": list(batches.class_names)}

    # ------------------------------------------------------------------- state
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
    feed = Feed(batches, mesh, settings.preview_images if settings.preview_every else 0)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params["model"]))
    log_info(f"training {config.model.family}: {size / 1e6:.1f} M parameters, {mesh.size} devices")

    scheduled_fid = None
    if extractor is not None and step < last:
        scheduled_fid = scheduled.start(config, task, mesh, extractor, workdir)

    validate = None
    if settings.validate_every:
        validation = Validation(config, task, mesh)
        validate = functools.partial(validation.measure, frozen=frozen)

    # ------------------------------------------------------------------- steps
    program = step_program(task, shardings, mesh, step_key)
    compiled: dict[bool, Any] = {}

    log = RunLog(workdir)
    stack.callback(log.close)
    stop = StopSignal()
    record = Record(
        task,
        info,
        workdir,
        feed,
        checkpoints,
        log,
        watch,
        saved=step,
        fid=scheduled_fid,
        validate=validate,
    )
    progress, leaving = None, step >= last
    while not leaving:
        waiting = time.monotonic()
        watch.report(f"waiting for the data of step {step + 1}")
        batch = stop.mark(feed.next(), mesh)
        waited = time.monotonic() - waiting
        stage = task.stage(step)
        if stage not in compiled:
            started = time.monotonic()
            watch.report("compiling the training step", slow=True)
            traced = program.trace(state, frozen, batch, stage)
            compiled[stage] = traced.lower().compile()
            size = compiled_bytes(compiled[stage]) / GIB
            took = f"{time.monotonic() - started:.1f} s"
            watch.report("waiting until all have compiled", slow=True)
            barrier(f"compiled at step {step}")
            log_info(f"compiled the training step in {took}: {size:.3g} GiB a device in all")
            progress = Progress(step, last, batch_size, count_flops(traced.jaxpr))
        assert progress is not None
        if stop.before_a_step(nothing_new=step == record.saved):
            break
        watch.report(f"step {step + 1}")
        state, metrics = compiled[stage](state, frozen, batch)
        step += 1
        progress.waited += waited
        leaving = stop.after(metrics) or step == last
        record.after(step, state, metrics, progress, leaving)

    # ------------------------------------------------------------------ the end
    checkpoints.wait()
    if stop.received and record.saved:
        log_info(
            f"stopped by a signal: saved step {record.saved}, the same command goes on from there"
        )
    elif stop.received:
        log_info("stopped by a signal before the first step: the same command begins again")
    elif not compiled:
        if _exported(workdir) != step:  # killed between the last checkpoint and its model
            record.export(step, state)
        log_info(f"nothing to do: {workdir} is at step {step} of {last}")
    else:
        log_info(f"done: {workdir / 'model'} is the averaged model after {step} steps")


@dataclasses.dataclass
class Feed:
    """Keeps batches on their way to the devices, and knows the data position of the last used."""

    batches: Any
    mesh: Any
    shown: int  # rows of the first batch, for pictures
    ahead: int = 2
    position: Any = None
    first: dict[str, np.ndarray] | None = None

    def __post_init__(self):
        self.queue = collections.deque()
        self.position = self.batches.get_state()

    def next(self) -> dict[str, jax.Array]:
        """Returns the next batch on the devices."""
        while len(self.queue) < self.ahead:
            batch = next(self.batches)
            if self.first is None:
                count = self.shown
                self.first = {name: gather(x[:count])[:count] for name, x in batch.items()}
            self.queue.append((to_device(batch, self.mesh), self.batches.get_state()))
        batch, self.position = self.queue.popleft()
        return batch


@dataclasses.dataclass
class Record:
    """What a run leaves in its workdir: numbers, pictures, checkpoints and the averaged model."""

    task: Any
    info: dict[str, Any]
    workdir: Path
    feed: Feed
    checkpoints: Checkpoints
    log: RunLog
    watch: Watchdog
    saved: int  # step of the newest checkpoint
    fid: scheduled.ScheduledFid | None = None
    validate: Any = None  # averaged parameters -> errors on held-out examples
    pending: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def after(
        self, step: int, state: TrainState, metrics: dict, progress: Progress, leaving: bool
    ) -> None:
        """Logs, draws and saves what is due after a step; when leaving, everything.

        Raises UserError if a loss since the last log is not finite.
        """
        settings = self.task.config.train
        self.pending.append(metrics)
        saving = leaving or step % settings.checkpoint_every == 0
        if saving or step % settings.log_every == 0:
            self._numbers(step, progress)
        working = time.monotonic()
        self.watch.report(f"drawing and saving step {step}", slow=True)
        if settings.preview_every and (leaving or step % settings.preview_every == 0):
            rows = self.feed.first or {}
            for name, picture in self.task.preview(state, rows).items():
                self.log.image(step, name, picture)
        if saving:
            self.checkpoints.save(step, state, self.feed.position)
            self.saved = step
            self.export(step, state)
        last = step == settings.steps
        if self.validate and (last or (step % settings.validate_every == 0 and not leaving)):
            self._validate(step, state)
        # Not for a run that was told to stop: it has little time.
        if self.fid and (last or (step % settings.fid_every == 0 and not leaving)):
            self._distance(step, state)
        progress.start += time.monotonic() - working  # what is no training is not timed as such

    def export(self, step: int, state: TrainState) -> None:
        """Writes the averaged model."""
        info = {**self.info, "steps": step}
        model_directory.write(self.workdir / "model", info, state.ema)

    def _validate(self, step: int, state: TrainState) -> None:
        found = self.validate(state.ema)
        parts = [f"{name} {value:.4g}" for name, value in found.items() if name != "val_examples"]
        log_info(
            f"step {step}  {', '.join(parts)} of {found['val_examples']:.0f} held-out examples"
        )
        self.log.scalars(step, found)

    def _distance(self, step: int, state: TrainState) -> None:
        assert self.fid is not None
        started = time.monotonic()
        found = self.fid.measure(state.ema)
        value, seconds = found[self.fid.name], time.monotonic() - started
        images = f"{found['fid_images']:.0f} images in {seconds:.1f} s"
        log_info(f"step {step}  {self.fid.name} {value:.4g} of {images}")
        self.log.scalars(step, found)

    def _numbers(self, step: int, progress: Progress) -> None:
        for i, metrics in enumerate(self.pending, start=step + 1 - len(self.pending)):
            self.watch.report(f"step {i}")  # the devices are behind this thread
            jax.block_until_ready(metrics)
        metrics = _finite(jax.device_get(self.pending), step, self.workdir, self.saved)
        self.pending = []
        line, speed = progress.report(step, float(metrics["loss"]))
        log_info(line)
        counts = _counts(self.feed.batches)
        self.log.scalars(step, {**self.task.summarise(metrics), **speed, **counts})


def _exported(workdir: Path) -> int:
    """-> the step of the model in a workdir, -1 if there is none."""

    def read() -> int:
        try:
            return model_directory.read_info(workdir / "model").get("steps", -1)
        except UserError:
            return -1

    return on_first(read)


def _finite(metrics: list[dict[str, Any]], step: int, workdir: Path, saved: int) -> dict[str, Any]:
    """-> the mean over steps; UserError that names the first step whose loss is not finite."""
    for i, m in enumerate(metrics):
        if not np.isfinite(m["loss"]):
            bad = step - len(metrics) + 1 + i
            kept = (
                f"{workdir} keeps the checkpoint of step {saved}" if saved else "nothing is saved"
            )
            raise UserError(
                f"the loss is {m['loss']} at step {bad}; {kept}; "
                "lower config.optim.lr, set config.optim.clip, or use float32"
            )
    return merged(metrics)


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


def _counts(batches: Any) -> dict[str, float]:
    broken = batches.counts()["broken"]
    return {"broken_images": float(broken)} if broken else {}
