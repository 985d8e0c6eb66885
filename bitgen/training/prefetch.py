"""Batches on their way to the devices while a step runs."""

import collections
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bitgen.runtime.distributed import gather
from bitgen.runtime.mesh import to_device


class Prefetch:
    """Keeps a few batches on the devices, and the data position after the last one used."""

    def __init__(self, batches: Any, mesh: Mesh, shown: int, ahead: int = 2):
        """Takes `data.Batches`; `shown` rows of the first batch are kept for pictures."""
        self.batches, self.mesh, self.shown, self.ahead = batches, mesh, shown, ahead
        self.queue = collections.deque()
        self.position = batches.get_state()
        self.first: dict[str, np.ndarray] = {}

    def next(self) -> dict[str, jax.Array]:
        """Returns the next batch on the devices."""
        while len(self.queue) < self.ahead:
            batch = next(self.batches)
            self.first = self.first or {
                name: gather(rows[: self.shown])[: self.shown] for name, rows in batch.items()
            }
            self.queue.append((to_device(batch, self.mesh), self.batches.get_state()))
        batch, self.position = self.queue.popleft()
        return batch
