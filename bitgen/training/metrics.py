"""Metrics and pictures of a run: console, TensorBoard and `metrics.jsonl`."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from bitgen.errors import UserError
from bitgen.images.output import write_png
from bitgen.images.plots import training_curves
from bitgen.runtime import devices


class RunLog:
    """Writes scalars and pictures of one run; does nothing on all processes but the first."""

    def __init__(self, workdir: str | os.PathLike):
        self.workdir = Path(workdir)
        self.writer = None
        if jax.process_index() == 0:
            # Imports TensorFlow, which takes seconds and is of no use elsewhere.
            from clu import metric_writers

            self.writer = metric_writers.create_default_writer(
                str(workdir), asynchronous=False, just_logging=False
            )
            self.metrics = (self.workdir / "metrics.jsonl").open("a")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Writes scalars at a step."""
        if self.writer is None:
            return
        self.writer.write_scalars(step, values)
        self.metrics.write(json.dumps({"step": step, **values}) + "\n")
        self.metrics.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> Path:
        """Writes a uint8 picture [H, W, 3] to TensorBoard and `pictures/NAME_STEP.png`."""
        path = self.workdir / "pictures" / f"{name}_{step:07d}.png"
        if self.writer is not None:
            path.parent.mkdir(exist_ok=True)
            write_png(path, image)
            self.writer.write_images(step, {name: image[None]})
        return path

    def close(self) -> None:
        """Flushes everything and draws `curves.png`."""
        if self.writer is not None:
            self.writer.flush()
            self.writer.close()
            self.metrics.close()
            with contextlib.suppress(UserError):  # nothing was logged yet
                write_png(self.workdir / "curves.png", training_curves(self.workdir))


class Progress:
    """Makes the progress line: step, loss, images/s, time left, and utilisation of the device."""

    def __init__(self, first: int, last: int, batch_size: int, flops: int):
        self.last, self.batch_size, self.flops = last, batch_size, flops
        self.step, self.start, self.waited = first, time.monotonic(), 0.0
        device = devices.by_kind(jax.devices()[0].device_kind)
        self.peak = device.flops * jax.device_count() if device else None

    def report(self, step: int, loss: float) -> tuple[str, dict[str, float]]:
        """Returns the line and its numbers for the steps since the last report."""
        now = time.monotonic()
        seconds, steps = now - self.start, step - self.step
        rate = steps / seconds
        numbers = {
            "images_per_second": rate * self.batch_size,
            "data_wait": self.waited / seconds,
        }
        left = time.strftime("%H:%M:%S", time.gmtime((self.last - step) / rate))
        line = (
            f"step {step}/{self.last}  loss {loss:.4f}  "
            f"{numbers['images_per_second']:.1f} images/s  "
            f"waiting for data {numbers['data_wait']:.0%}  left {left}"
        )
        if self.flops and self.peak:
            numbers["mfu"] = self.flops * rate / self.peak
            line += f"  model FLOPs utilisation {numbers['mfu']:.1%}"
        self.step, self.start, self.waited = step, now, 0.0
        return line, numbers


def merged(metrics: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """Returns the mean of each metric over steps; NaN, of steps that lack it, is left out."""
    names = {name for m in metrics for name in m}
    return {
        name: np.mean(np.stack([m[name] for m in metrics if name in m]), axis=0)
        for name in sorted(names)
    }
