"""What happens after a training step: logs, pictures, checkpoints, the averaged model, metrics."""

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitgen.errors import UserError
from bitgen.hub import model_directory
from bitgen.runtime.distributed import on_first
from bitgen.runtime.logging import log_info
from bitgen.runtime.watchdog import Watchdog
from bitgen.training.checkpoint import Checkpoints
from bitgen.training.metrics import Progress, RunLog, merged
from bitgen.training.prefetch import Prefetch
from bitgen.training.state import TrainState

Measure = Callable[[Any], dict[str, float]]  # averaged parameters -> metrics by name


@dataclasses.dataclass
class Hooks:
    """Runs what `config.train` asks for after each step."""

    task: Any
    workdir: Path
    prefetch: Prefetch
    checkpoints: Checkpoints
    log: RunLog
    watch: Watchdog
    saved: int  # step of the newest checkpoint
    fid: Measure | None = None
    validate: Measure | None = None
    pending: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # since the last log

    def after(
        self, step: int, state: TrainState, metrics: dict, progress: Progress, leaving: bool
    ) -> None:
        """Logs, draws, saves and measures what is due after a step, or everything when leaving.

        Raises UserError if a loss since the last log is not finite.
        """
        settings = self.task.config.train
        self.pending.append(metrics)
        saving = leaving or step % settings.checkpoint_every == 0
        if saving or step % settings.log_every == 0:
            self._log(step, progress)
        started = time.monotonic()
        self.watch.report(f"drawing and saving step {step}", slow=True)
        if settings.preview_every and (leaving or step % settings.preview_every == 0):
            for name, picture in self.task.preview(state, self.prefetch.first).items():
                self.log.image(step, name, picture)
        if saving:
            self.checkpoints.save(step, state, self.prefetch.position)
            self.saved = step
            self.export(step, state)
        for measure, every in (
            (self.validate, settings.validate_every),
            (self.fid, settings.fid_every),
        ):
            # A run that was told to stop has little time.
            if measure and (step == settings.steps or (step % every == 0 and not leaving)):
                self._measure(measure, step, state)
        progress.start += time.monotonic() - started  # what is no training is not timed as such

    def export(self, step: int, state: TrainState) -> None:
        """Writes the averaged model to `workdir/model`."""
        names = list(self.prefetch.batches.class_names)
        info = {**self.task.info, "class_names": names, "steps": step}
        model_directory.write(self.workdir / "model", info, state.ema)

    def export_if_missing(self, step: int, state: TrainState) -> None:
        """Writes the averaged model of a run that was killed after its last checkpoint."""

        def exported() -> int:
            try:
                return model_directory.read_info(self.workdir / "model").get("steps", -1)
            except UserError:
                return -1

        if on_first(exported) != step:
            self.export(step, state)

    def _measure(self, measure: Measure, step: int, state: TrainState) -> None:
        started = time.monotonic()
        found = measure(state.ema)
        text = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
        log_info(f"step {step}  {text} in {time.monotonic() - started:.1f} s")
        self.log.scalars(step, found)

    def _log(self, step: int, progress: Progress) -> None:
        for i, metrics in enumerate(self.pending, start=step + 1 - len(self.pending)):
            self.watch.report(f"step {i}")  # the devices are behind this thread
            jax.block_until_ready(metrics)
        metrics = self._mean(jax.device_get(self.pending), step)
        self.pending = []
        line, speed = progress.report(step, float(metrics["loss"]))
        log_info(line)
        broken = self.prefetch.batches.counts()["broken"]
        counts = {"broken_images": float(broken)} if broken else {}
        self.log.scalars(step, {**self.task.summarise(metrics), **speed, **counts})

    def _mean(self, metrics: list[dict[str, Any]], step: int) -> dict[str, Any]:
        """Returns the mean over steps; UserError names the first step whose loss is not finite."""
        for i, m in enumerate(metrics, start=step + 1 - len(metrics)):
            if not np.isfinite(m["loss"]):
                kept = f"{self.workdir} keeps the checkpoint of step {self.saved}"
                raise UserError(
                    f"the loss is {m['loss']} at step {i}; "
                    f"{kept if self.saved else 'nothing is saved'}; "
                    "lower config.optim.lr, set config.optim.clip, or use float32"
                )
        return merged(metrics)
