"""BitDance's autoregressive sampler: one group of tokens after another, with a key-value cache.

The layers are applied one by one on unstacked parameters, because slicing stacked parameters would
copy every weight for every token.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from bitgen.errors import UserError
from bitgen.nn.matmul import FEATURES_FIRST, cast_kernels
from bitgen.samplers.guidance import guidance_schedule


@dataclasses.dataclass(frozen=True)
class AutoregressivePlan:
    """Settings of the autoregressive sampler; static, so that a plan is one compiled program."""

    guidance: float = 4.0  # 1: none, and no unconditional half is computed
    guidance_schedule: str = "linear"  # over tokens, from 1; or 'constant'
    head_steps: int = 100  # noisy steps of the flow; one without noise follows
    segments: int = 4  # loops, each reading only as much of the cache as it has filled


class Prepared(NamedTuple):
    """A generator's parameters in the layout that the loops read."""

    variables: Any  # of the generator but for its layers
    layers: tuple[Any, ...]  # the variables of each


# Keys and values of a layer, each [r, heads, N, head_dim].
Cache = tuple[Array, Array]


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
      params: its parameters, or what `prepare` returned.
      labels: the class of each image.
      keys: one key per image, so that an image does not depend on its batch.
      plan: the settings.

    Raises UserError for an impossible setting.
    """
    b, groups = len(labels), generator.tokens // generator.together
    scales = guidance_schedule(plan.guidance, plan.guidance_schedule, np.arange(groups) / groups)
    if plan.segments < 1:
        raise UserError(f"the sampler needs at least one segment, got {plan.segments}")
    guided = plan.guidance != 1

    prepared = params if isinstance(params, Prepared) else prepare(generator, params)
    # The unconditional rows are equal until the first group is drawn.
    null = jnp.full((1 if guided else 0,), generator.num_classes, labels.dtype)
    caches, cond = start(generator, prepared, jnp.concatenate([labels, null]))
    if guided:
        each = np.minimum(np.arange(2 * b), b)
        caches, cond = jax.tree.map(lambda x: x[each], (caches, cond))

    def draw(cond, index, scale):
        """[r, p, d] -> bits of the group [b, p, k]; rows after the first b are unconditional."""
        group_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        uncond = cond[b:] if guided else None
        return _head(generator, prepared.variables, cond[:b], uncond, group_keys, plan, scale)

    def both(bits):
        return jnp.concatenate([bits, bits]) if guided else bits

    if guided and scales[0] == 1:
        # Without guidance, each half draws its own first group, as in the original, and the
        # unconditional half continues from its own.
        first_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, 0)
        other_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, groups)
        first_keys = jnp.concatenate([first_keys, other_keys])
        rows = _head(generator, prepared.variables, cond, None, first_keys, plan, 1.0)
        first = rows[:b]
    else:
        first = draw(cond, 0, scales[0])
        rows = both(first)

    drawn = [first[None]]
    parts = np.array_split(np.arange(1, groups), plan.segments)
    for part in (part for part in parts if len(part)):
        caches = grow(caches, generator.first + int(part[-1]) * generator.together)

        def body(carry, x):
            caches, rows = carry
            index, scale = x
            caches, cond = advance(generator, prepared, caches, rows, index)
            bits = draw(cond, index, scale)
            return (caches, both(bits)), bits

        xs = jnp.asarray(part), jnp.asarray(scales[part])
        (caches, rows), bits = jax.lax.scan(body, (caches, rows), xs)
        drawn.append(bits)
    return generator.arrange(jnp.concatenate(drawn).swapaxes(0, 1))


def prepare(generator: Any, params: Any, platform: str = "") -> Prepared:
    """Returns parameters in the layout that the loops read: layers unstacked, kernels cast.

    On a CPU, kernels are also transposed. That takes as long as a few groups, so do it once for
    many calls. `platform` defaults to that of the devices.
    """
    transposed = (platform or jax.default_backend()) == "cpu"
    params = cast_kernels(params, generator.dtype)
    block, group = generator.block(), _one_group(generator)
    stacked = jax.vmap(lambda layer: _variables(block, layer, transposed, *group))(params["layers"])
    layers = (jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(generator.layers))
    rest = {name: value for name, value in params.items() if name != "layers"}
    return Prepared(_variables(generator, rest, transposed, method=_all_products), tuple(layers))


def start(
    generator: Any, prepared: Prepared, labels: Int[Array, " r"]
) -> tuple[tuple[Cache, ...], Float[Array, "r p d"]]:
    """Returns the class tokens' caches, one per layer, and the conditioning of the first group."""
    head_dim = generator.width // generator.heads
    shape = (len(labels), generator.heads, generator.first, head_dim)
    empty = jnp.zeros(shape, generator.dtype)
    x = generator.apply(prepared.variables, labels, method="embed_labels")
    return _through_layers(generator, prepared, ((empty, empty),) * generator.layers, x, 0, 0)


def grow(caches: tuple[Cache, ...], length: int) -> tuple[Cache, ...]:
    """Returns caches with room for `length` positions."""

    def pad(x):
        return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))

    return jax.tree.map(pad, caches)


def advance(
    generator: Any,
    prepared: Prepared,
    caches: tuple[Cache, ...],
    bits: Bool[Array, "r p k"],
    index: Any,
) -> tuple[tuple[Cache, ...], Float[Array, "r p d"]]:
    """Returns the caches after the group before `index`, and the conditioning of group `index`.

    The caches must have room for it.
    """
    x = generator.apply(prepared.variables, bits, method="embed_bits")
    position = generator.first + (index - 1) * generator.together
    return _through_layers(generator, prepared, caches, x, position, index)


def _through_layers(generator, prepared, caches, x, position, index):
    p = generator.together
    rotations = jax.lax.dynamic_slice_in_dim(
        jnp.asarray(generator.rotations()), position, x.shape[1]
    )
    block, after = generator.block(), []
    for layer, cache in zip(prepared.layers, caches, strict=True):
        x, cache = block.apply(layer, x, rotations, cache, position)
        after.append(cache)
    embedding = prepared.variables["params"]["position_embedding"]
    positions = jax.lax.dynamic_slice_in_dim(embedding, index * p, p)
    cond = generator.apply(prepared.variables, x[:, -p:], positions, method="condition")
    return tuple(after), cond


def _variables(module, params, transposed, *group, method=None):
    """Returns the parameters and, if transposed, the kernels that a pass transposes."""
    variables = {"params": params}
    if not transposed:
        return variables
    _, stored = module.apply(variables, *group, method=method, mutable=[FEATURES_FIRST])
    return {**variables, **stored}


def _one_group(generator):
    x = jnp.zeros((1, generator.together, generator.width), generator.dtype)
    return x, jnp.asarray(generator.rotations()[: generator.together])


def _all_products(generator):
    x, p = _one_group(generator)[0], generator.together
    tokens = jnp.zeros((1, p, generator.token_bits))
    generator.embed_bits(tokens > 0)
    generator.head.predict(tokens, jnp.zeros(1), x)


def _head(generator, variables, cond, uncond, keys, plan, scale):
    return generator.apply(
        variables,
        cond,
        uncond,
        keys,
        steps=plan.head_steps,
        scale=scale,
        method=lambda module, *args, **kwargs: module.head.sample(*args, **kwargs),
    )
