"""Errors on held-out examples on a schedule during training."""

from collections.abc import Callable
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


def start(config: Any, task: Any, mesh: Mesh, frozen: Any) -> Callable[[Any], dict[str, float]]:
    """Returns f(averaged parameters) -> `val_NAME`, the mean of each of the task's `errors`.

    The mean is over the held-out split of `config.data`, with the same random draws each time;
    `val_examples` is the number of examples. Every process must call f, and measures its share.
    Raises UserError if the run trains on the held-out examples, or there are none.
    """
    if config.data.split != "train" or not config.data.holdout:
        raise UserError(
            f"config.train.validate_every={config.train.validate_every} needs examples that "
            f"are not trained on: config.data.split='train' and a config.data.holdout above 0, "
            f"got {config.data.split!r} and {config.data.holdout}"
        )

    def sums(params, frozen, batch, real, key):
        errors = {**task.errors(params, frozen, batch, key), "examples": jnp.ones(real.shape)}
        return jax.tree.map(lambda each: jnp.sum(jnp.where(real, each, 0)), errors)

    program = jax.jit(sums, out_shardings=replicated(mesh))

    def measure(params: Any) -> dict[str, float]:
        rows = config.train.batch_size // jax.process_count()
        key = jax.random.key(config.seed)
        totals: dict[str, float] = {}
        for i, batch in enumerate(data_pass(config.data, rows, split=SPLIT)):
            real = np.arange(rows) < len(batch["label"])
            padded = {name: pad_rows(batch[name], rows) for name in batch if name != "index"}
            placed = to_device({**padded, "real": real}, mesh)
            real = placed.pop("real")
            found = program(params, frozen, placed, real, jax.random.fold_in(key, i))
            for name, value in jax.device_get(found).items():
                totals[name] = totals.get(name, 0.0) + float(value)
        count = totals.pop("examples")
        means = {f"val_{name}": value / count for name, value in totals.items()}
        return {**means, "val_examples": count}

    return measure
