"""The autoregressive sampler of BitDance: one group of tokens after another, with a cache.

The layers are applied one by one on unstacked parameters, because slicing stacked ones would copy
every weight for every token.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bitgen.errors import UserError
from bitgen.samplers.guidance import guidance_schedule


@dataclasses.dataclass(frozen=True)
class AutoregressivePlan:
    """Settings of the autoregressive sampler; static, so that a plan is one compiled program."""

    guidance: float = 4.0  # 1: none, and no unconditional half is computed
    guidance_schedule: str = "linear"  # over tokens, from 1; or 'constant'
    head_steps: int = 100  # noisy steps of the flow; one without noise follows
    segments: int = 4  # loops, each reading only as much of the cache as it has filled


class State(NamedTuple):
    """What the next group needs: a cache of keys and values [r, heads, N, head_dim] a layer."""

    params: Any  # of the generator, layers unstacked
    caches: tuple[tuple[Array, Array], ...]


def sample_bits(
    generator: Any,
    params: Any,
    labels: Int[Array, " b"],
    keys: PRNGKeyArray,
    plan: AutoregressivePlan,
) -> Bool[Array, "b h w k"]:
    """Returns bits drawn for labels [b].

    Args:
      generator: a BitDance.
      params: its parameters.
      labels: of the images.
      keys: one key an image, so that an image does not depend on its batch.
      plan: the settings.

    Raises UserError for an impossible setting.
    """
    b, groups = len(labels), generator.tokens // generator.together
    scales = guidance_schedule(plan.guidance, plan.guidance_schedule, np.arange(groups) / groups)
    if plan.segments < 1:
        raise UserError(f"the sampler needs at least one segment, got {plan.segments}")
    guided = plan.guidance != 1

    null = jnp.full_like(labels, generator.num_classes)
    state, cond = start(generator, params, jnp.concatenate([labels, null]) if guided else labels)

    def draw(cond, index, scale):
        """[r, p, d] -> bits of the group [b, p, k]; rows after the first b are unconditional."""
        group_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        uncond = cond[b:] if guided else None
        return _head(generator, state.params, cond[:b], uncond, group_keys, plan, scale)

    def both(bits):
        return jnp.concatenate([bits, bits]) if guided else bits

    if guided and scales[0] == 1:
        # Unguided, each half draws a first group of its own, as in the original: the
        # unconditional half goes on from what it drew itself.
        first_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
        other_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, groups)
        first_keys = jnp.concatenate([first_keys, other_keys])
        rows = _head(generator, state.params, cond, None, first_keys, plan, 1.0)
        first = rows[:b]
    else:
        first = draw(cond, 0, scales[0])
        rows = both(first)

    drawn, caches = [first[None]], state.caches
    parts = np.array_split(np.arange(1, groups), plan.segments)
    for part in (part for part in parts if len(part)):
        # Positions that the cache holds after this part.
        length = generator.first + int(part[-1]) * generator.together

        def body(carry, x, length=length):
            caches, rows = carry
            index, scale = x
            new, cond = advance(generator, State(state.params, caches), rows, index, length)
            bits = draw(cond, index, scale)
            return (new.caches, both(bits)), bits

        xs = jnp.asarray(part), jnp.asarray(scales[part])
        (caches, rows), bits = jax.lax.scan(body, (caches, rows), xs)
        drawn.append(bits)
    return generator.arrange(jnp.concatenate(drawn).swapaxes(0, 1))


def start(
    generator: Any, params: Any, labels: Int[Array, " r"]
) -> tuple[State, Float[Array, "r p d"]]:
    """Returns the state after the class tokens, and the head's conditioning of the first group."""
    # Once here, not once a token.
    params = jax.tree.map_with_path(
        lambda path, x: x.astype(generator.dtype) if path[-1].key == "kernel" else x, params
    )
    layers = tuple(
        jax.tree.map(lambda x, i=i: x[i], params["layers"]) for i in range(generator.layers)
    )
    params = {**params, "layers": layers}
    head_dim = generator.width // generator.heads
    shape = (len(labels), generator.heads, generator.length, head_dim)
    empty = jnp.zeros(shape, generator.dtype)
    state = State(params, ((empty, empty),) * generator.layers)
    x = _apply(generator, params, labels, method="embed_labels")
    return _through_layers(generator, state, x, 0, generator.first, 0)


def advance(
    generator: Any, state: State, bits: Bool[Array, "r p k"], index: Any, length: int
) -> tuple[State, Float[Array, "r p d"]]:
    """Returns the state after the group before `index`, and the conditioning of group `index`.

    `length` is a static bound on the positions filled by then.
    """
    x = _apply(generator, state.params, bits, method="embed_bits")
    position = generator.first + (index - 1) * generator.together
    return _through_layers(generator, state, x, position, length, index)


def _through_layers(generator, state, x, position, length, index):
    p = generator.together
    rotations = jax.lax.dynamic_slice_in_dim(
        jnp.asarray(generator.rotations()), position, x.shape[1]
    )
    block, caches = generator.block(), []
    for params, cache in zip(state.params["layers"], state.caches, strict=True):
        x, cache = block.apply({"params": params}, x, rotations, cache, position, length)
        caches.append(cache)
    positions = jax.lax.dynamic_slice_in_dim(state.params["position_embedding"], index * p, p)
    cond = _apply(generator, state.params, x[:, -p:], positions, method="condition")
    return State(state.params, tuple(caches)), cond


def _head(generator, params, cond, uncond, keys, plan, scale):
    return _apply(
        generator,
        params,
        cond,
        uncond,
        keys,
        steps=plan.head_steps,
        scale=scale,
        method=lambda module, *args, **kwargs: module.head.sample(*args, **kwargs),
    )


def _apply(generator, params, *args, **kwargs):
    return generator.apply({"params": params}, *args, **kwargs)
