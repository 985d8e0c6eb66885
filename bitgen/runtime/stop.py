"""Stops a run early on SIGTERM or SIGINT, after the same step on all processes."""

import collections
import signal
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bitgen.runtime.mesh import to_device

# Steps after which one is waited for: devices never wait for hosts, and a stop for no more steps.
_LAG = 1


class StopSignal:
    """Records SIGTERM and SIGINT.

    A signal may reach one process or all, at different times. Each process puts a flag into its
    rows of every batch, the step returns whether any flag is set (`state.step_program`), and all
    processes read the result of the same step. JAX's own preemption service would block Python
    while it waits.
    """

    def __init__(self):
        self.received, self.noted, self.several = False, False, jax.process_count() > 1
        self.found: collections.deque[jax.Array] = collections.deque()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._note)

    def _note(self, number, frame):
        del number, frame
        self.noted = True
        self.received = not self.several

    def mark(self, batch: dict[str, jax.Array], mesh: Mesh) -> dict[str, jax.Array]:
        """Returns the batch with this process's flag in its rows."""
        if not self.several:
            return batch
        rows = len(next(iter(batch.values()))) // jax.process_count()
        return {**batch, **to_device({"stop": np.full(rows, self.noted)}, mesh)}

    def before_a_step(self, nothing_new: bool) -> bool:
        """Returns whether to end before the next step, because there is nothing new to save."""
        return self.received and nothing_new

    def after(self, metrics: dict[str, Any]) -> bool:
        """Returns whether to end; call it after every step. Removes `stop` from the metrics.

        Waits for the previous step; otherwise hosts would be hundreds of steps ahead when a signal
        comes.
        """
        self.found.append(metrics.pop("stop") if self.several else metrics["loss"])
        if len(self.found) > _LAG:
            found = jax.block_until_ready(self.found.popleft())
            if self.several:
                self.received = bool(found)
        return self.received
