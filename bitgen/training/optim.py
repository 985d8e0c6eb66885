"""Optimiser, schedule, frozen parameters and accumulated gradients."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from bitgen.errors import UserError, choose
from bitgen.nn.conv import unrolled


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


def make_optimiser(
    config: Any, steps: int, freeze: Sequence[str] = ()
) -> optax.GradientTransformation:
    """Returns clipping, Adam or AdamW, and the schedule.

    Leaves whose path matches any of `config.no_decay` have no weight decay. Leaves that match any
    of `freeze` do not change, and have no moments and no part in the clipped norm.
    """

    def decayed(params):
        def one(path, _):
            return not any(re.search(pattern, path_name(path)) for pattern in config.no_decay)

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
    if not freeze:
        return optimiser

    def labels(params):
        return jax.tree.map(lambda t: "trained" if t else "frozen", trained(params, freeze))

    return optax.multi_transform({"trained": optimiser, "frozen": optax.set_to_zero()}, labels)


def trained(params: PyTree, freeze: Sequence[str]) -> PyTree:
    """Returns a tree of bools: which leaves have a path that no pattern of `freeze` is found in.

    Raises UserError for a pattern that is in no path or is no regular expression.
    """
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    for pattern in freeze:
        try:
            found = any(re.search(pattern, path) for path in paths)
        except re.error as error:
            raise UserError(
                f"config.train.freeze: {pattern!r} is not a regular expression ({error})"
            ) from error
        if not found:
            some = ", ".join(paths[:: max(len(paths) // 4, 1)][:5])
            raise UserError(
                f"config.train.freeze: {pattern!r} matches no parameter; some paths are {some}"
            )

    def one(path, _):
        return not any(re.search(pattern, path_name(path)) for pattern in freeze)

    return jax.tree_util.tree_map_with_path(one, params)


def where_trained(mask: PyTree, new: PyTree, old: PyTree) -> PyTree:
    """Returns the trained leaves of `new` and the frozen leaves of `old`."""
    return jax.tree.map(lambda t, n, o: n if t else o, mask, new, old)


def path_name(path: Sequence[Any]) -> str:
    """Returns a leaf's path for patterns: `encoder/conv/kernel`."""
    return "/".join(str(k.key) for k in path)


def accumulate_gradients(
    loss_fn: Callable[[PyTree, PyTree, PRNGKeyArray], tuple[Float[Array, ""], PyTree]],
    params: PyTree,
    batch: PyTree,
    key: PRNGKeyArray,
    parts: int,
) -> tuple[tuple[Float[Array, ""], PyTree], PyTree]:
    """Returns ((value, metrics), gradients) of `loss_fn(params, batch, key) -> (value, metrics)`.

    With several parts, all three are means over equal parts of the batch (see `mean_of_parts`), in
    the memory of one part.
    """
    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    return mean_of_parts(lambda part, key: gradient(params, part, key), batch, key, parts)


def mean_of_parts(
    function: Callable[[PyTree, PRNGKeyArray], PyTree],
    batch: PyTree,
    key: PRNGKeyArray,
    parts: int,
) -> PyTree:
    """Returns the mean of `function(part, key)` over parts of the batch, one after another.

    The leaves of `batch` are [b, ...], b a multiple of `parts` times the devices that share it;
    those of the result are float32. Part i holds the examples i, i + parts, i + 2 parts, ... (of
    each device its own, so that nothing moves) and gets the key folded with i. A single part is the
    whole batch with the unchanged key, and its result is not converted.
    """
    if parts == 1:
        return function(batch, key)
    by_part = jax.tree.map(
        lambda x: jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0), batch
    )

    def one(total, numbered):
        i, part = numbered
        result = function(part, jax.random.fold_in(key, i))
        return jax.tree.map(lambda t, r: t + r.astype(jnp.float32), total, result), None

    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], by_part), key)
    zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, jnp.float32), shapes)
    numbered = (jnp.arange(parts), by_part)
    total, _ = jax.lax.scan(one, zeros, numbered, unroll=unrolled(parts))
    return jax.tree.map(lambda t: t / parts, total)
