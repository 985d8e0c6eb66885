"""Optimiser, schedule and decay mask from a config."""

import re
from typing import Any

import jax
import optax

from bitgen.errors import choose


def make_schedule(config: Any, steps: int) -> optax.Schedule:
    """Returns the learning rate by step: a linear warm-up, then constant, cosine or one drop.

    Raises UserError for an unknown schedule.
    """
    rest = max(steps - config.warmup, 1)
    schedules = {
        "constant": lambda: optax.constant_schedule(config.lr),
        "cosine": lambda: optax.cosine_decay_schedule(
            config.lr, rest, alpha=config.final_lr / config.lr
        ),
        "drop": lambda: optax.piecewise_constant_schedule(
            config.lr, {config.drop_step - config.warmup: 0.1}
        ),
    }
    after = choose("schedule", config.schedule, schedules)()
    if not config.warmup:
        return after
    # From lr / warmup at step 0, so that the first step moves.
    warmup = optax.linear_schedule(config.lr / config.warmup, config.lr, config.warmup - 1)
    return optax.join_schedules([warmup, after], [config.warmup])


def make_optimiser(config: Any, steps: int) -> optax.GradientTransformation:
    """Returns clipping, Adam or AdamW, and the schedule.

    Weight decay leaves out leaves whose path matches any of `config.no_decay`.
    """

    def decayed(params):
        def one(path, _):
            name = "/".join(str(k.key) for k in path)
            return not any(re.search(pattern, name) for pattern in config.no_decay)

        return jax.tree_util.tree_map_with_path(one, params)

    schedule = make_schedule(config, steps)
    optimisers = {
        "adam": lambda: optax.adam(schedule, b1=config.b1, b2=config.b2),
        "adamw": lambda: optax.adamw(
            schedule, b1=config.b1, b2=config.b2, weight_decay=config.weight_decay, mask=decayed
        ),
    }
    optimiser = choose("optimiser", config.name, optimisers)()
    if config.clip > 0:
        optimiser = optax.chain(optax.clip_by_global_norm(config.clip), optimiser)
    return optimiser
