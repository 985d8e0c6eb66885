"""BiGR's masked sampler (arXiv 2410.14672): a few tokens at a time, the most confident first.

Each iteration runs the transformer once over the image, draws the bits of every masked token with
the Bernoulli head, and keeps the tokens whose probabilities are farthest from one half. How many
it keeps follows MaskGIT's cosine schedule (Chang et al. 2022).
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bitgen.errors import UserError
from bitgen.nn.matmul import cast_kernels
from bitgen.samplers.guidance import guidance_schedule, temperature_schedule


@dataclasses.dataclass(frozen=True)
class MaskedPlan:
    """Settings of the masked sampler; static, so that a plan is one compiled program."""

    iterations: int = 20
    guidance: float = 3.0  # 1: none, and no unconditional half is computed
    guidance_schedule: str = "constant"  # or 'linear', from 1
    order: str = "cosine"  # tokens left after each iteration; or 'linear'
    gumbel: float = 0.01  # temperature of the noise on the confidences
    gumbel_schedule: str = "constant"  # or 'down', 'up'
    denoiser_steps: int = 100
    denoiser_temperature: float = 1.0
    segments: int = 8  # loops, each denoising only as many tokens as its first iteration needs


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What each iteration does; static. Iterations that would draw no token are left out."""

    counts: Int[np.ndarray, " i"]  # tokens that it draws
    left: Int[np.ndarray, " i"]  # masked tokens before it
    guidance: Float[np.ndarray, " i"]
    gumbel: Float[np.ndarray, " i"]


def make_schedule(plan: MaskedPlan, tokens: int) -> Schedule:
    """Returns the schedule for an image of `tokens` masked tokens.

    Raises UserError for an impossible setting.
    """
    if plan.iterations < 1 or tokens < 1:
        raise UserError(
            f"the sampler needs an iteration and a masked token at least, "
            f"got iterations {plan.iterations} and tokens {tokens}"
        )
    ratios = np.arange(1, plan.iterations + 1) / plan.iterations
    shares = {"cosine": np.cos(math.pi / 2 * ratios), "linear": 1 - ratios}
    if plan.order not in shares:
        raise UserError(f"unknown order {plan.order!r}, have {sorted(shares)}")
    after = np.floor(shares[plan.order] * tokens).astype(int)
    before = np.concatenate([[tokens], after[:-1]])
    drawn = before > after
    return Schedule(
        counts=(before - after)[drawn],
        left=before[drawn],
        guidance=guidance_schedule(plan.guidance, plan.guidance_schedule, ratios)[drawn],
        gumbel=temperature_schedule(plan.gumbel, plan.gumbel_schedule, ratios)[drawn],
    )


def sample_bits(
    generator: Any,
    params: Any,
    classes: Float[Array, "b d"] | Int[Array, " b"],
    keys: PRNGKeyArray,
    plan: MaskedPlan,
    *,
    known: Bool[Array, "b h w k"] | None = None,
    mask: Bool[Array, "b h w"] | None = None,
    masked: int | None = None,
) -> Bool[Array, "b h w k"]:
    """Returns bits drawn for labels [b], or for class embeddings [b, d] such as mixtures.

    Args:
      generator: a BiGR.
      params: its parameters.
      classes: labels, or embeddings from `embed_labels`.
      keys: one key per image, so that an image does not depend on its batch.
      plan: the settings.
      known: bits to start from; they never change where `mask` is false.
      mask: which tokens to draw; the same number in each image.
      masked: that number, which must be static.
    """
    params = cast_kernels(params, generator.dtype)
    classes, state, segments = init_loop(generator, params, classes, plan, known, mask, masked)
    for window, xs in segments:

        def body(state, x, window=window):
            return iteration(generator, params, classes, keys, plan, window, state, x), None

        state, _ = jax.lax.scan(body, state, xs)
    return state[0].reshape(len(classes), *generator.grid, generator.bits)


def init_loop(
    generator: Any, params, classes, plan: MaskedPlan, known=None, mask=None, masked=None
):
    """Returns class embeddings [b, d], the first state of `iteration`, and the loop's segments.

    A segment is its window and the stacked x of its iterations. The arguments are those of
    `sample_bits`.
    """
    b, n, k = len(classes), generator.tokens, generator.bits
    if classes.ndim == 1:
        classes = generator.apply({"params": params}, classes, method="embed_labels")
    state = (
        jnp.zeros((b, n, k), bool) if known is None else known.reshape(b, n, k),
        jnp.ones((b, n), bool) if mask is None else mask.reshape(b, n),
    )
    schedule = make_schedule(plan, n if mask is None else masked or 0)
    total, segments = len(schedule.counts), []
    for part in np.array_split(np.arange(total), min(plan.segments, total)):
        xs = (part, schedule.counts[part], schedule.guidance[part], schedule.gumbel[part])
        segments.append((int(schedule.left[part[0]]), tuple(map(jnp.asarray, xs))))
    return classes, state, segments


def iteration(generator: Any, params, classes, keys, plan: MaskedPlan, window: int, state, x):
    """Draws `count` tokens: takes and returns the state (bits [b, n, k], mask [b, n]).

    `window` is at least the number of masked tokens; x is (index, count, guidance, gumbel).
    """
    bits, mask = state
    index, count, scale, gumbel = x
    head_keys, gumbel_keys, draw_keys = _split(keys, index)
    cond, uncond = _conditioning(generator, params, bits, mask, classes, plan)

    # The head sees only the window: masked tokens, then known ones if there is room. [b, window]
    where = jnp.argsort(~mask, axis=1, stable=True)[:, :window]
    candidate = jnp.take_along_axis(mask, where, axis=1)
    probs = generator.apply(
        {"params": params},
        jnp.take_along_axis(cond, where[..., None], axis=1),
        None if uncond is None else jnp.take_along_axis(uncond, where[..., None], axis=1),
        head_keys,
        steps=plan.denoiser_steps,
        scale=scale,
        temperature=plan.denoiser_temperature,
        method=lambda module, *args, **kwargs: module.denoiser.sample(*args, **kwargs),
    )
    confidence = jnp.mean(jnp.abs(probs - 0.5) * 2, axis=-1)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (window,)))(gumbel_keys)
    confidence = jnp.where(candidate, confidence + gumbel * noise, -jnp.inf)
    rank = jnp.argsort(jnp.argsort(-confidence, axis=1), axis=1)
    chosen = (rank < count) & candidate
    drawn = jax.vmap(jax.random.bernoulli)(draw_keys, probs)

    rows = jnp.arange(len(bits))[:, None]
    old = jnp.take_along_axis(bits, where[..., None], axis=1)
    bits = bits.at[rows, where].set(jnp.where(chosen[..., None], drawn, old))
    return bits, mask.at[rows, where].set(candidate & ~chosen)


def _conditioning(generator: Any, params, bits, mask, classes, plan: MaskedPlan):
    """Returns the head's conditioning with the class and, if guided, without it, [b, n, d] each."""
    if plan.guidance == 1:
        cond = generator.apply({"params": params}, bits, mask, classes, method="hidden")
        return cond, None
    null = params["class_embedding"][generator.num_classes]
    both = jnp.concatenate([classes, jnp.broadcast_to(null[None], classes.shape)])
    hidden = generator.apply(
        {"params": params},
        jnp.concatenate([bits, bits]),
        jnp.concatenate([mask, mask]),
        both,
        method="hidden",
    )
    cond, uncond = jnp.split(hidden, 2)
    return cond, uncond


def _split(keys, index):
    """Returns three keys [b] of an iteration from keys [b]."""
    keys = jax.vmap(lambda key: jax.random.split(jax.random.fold_in(key, index), 3))(keys)
    return keys[:, 0], keys[:, 1], keys[:, 2]
