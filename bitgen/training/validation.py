"""Errors on held-out examples, for a training loop to measure on a schedule."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from bitgen.errors import UserError
from bitgen.runtime.distributed import pad_rows
from bitgen.runtime.mesh import replicated, to_device
from bitgen.training.fid import data_pass

SPLIT = "test"


class Validation:
    """Means of a task's `errors` over the held-out split of `config.data`, for the same draws.

    Every process must measure, on its share of the split; all get the same numbers.
    """

    def __init__(self, config: Any, task: Any, mesh: Mesh):
        """Takes the settings of a run; computes nothing.

        Raises UserError if the run learns from the held-out examples, or there are none.
        """
        if config.data.split != "train" or not config.data.holdout:
            raise UserError(
                f"config.train.validate_every={config.train.validate_every} needs examples that "
                f"are not trained on: config.data.split='train' and a config.data.holdout above 0, "
                f"got {config.data.split!r} and {config.data.holdout}"
            )
        self.config, self.mesh = config, mesh

        def sums(params, frozen, batch, real, key):
            errors = {**task.errors(params, frozen, batch, key), "examples": jnp.ones(real.shape)}
            return jax.tree.map(lambda each: jnp.sum(jnp.where(real, each, 0)), errors)

        self._sums = jax.jit(sums, out_shardings=replicated(mesh))

    def measure(self, params: Any, frozen: Any) -> dict[str, float]:
        """Returns each mean as `val_NAME`, and `val_examples`, how many it is of."""
        size = self.config.train.batch_size
        rows = size // jax.process_count()
        key = jax.random.key(self.config.seed)
        totals: dict[str, float] = {}
        batches = data_pass(self.config.data, rows, split=SPLIT)
        for i, batch in enumerate(batches):
            real = np.arange(rows) < len(batch["label"])
            padded = {name: pad_rows(batch[name], rows) for name in batch if name != "index"}
            placed = to_device({**padded, "real": real}, self.mesh)
            real = placed.pop("real")
            sums = self._sums(params, frozen, placed, real, jax.random.fold_in(key, i))
            for name, value in jax.device_get(sums).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        count = totals.pop("examples")
        return {
            "val_examples": count,
            **{f"val_{name}": value / count for name, value in totals.items()},
        }
