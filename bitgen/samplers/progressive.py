"""Sampling watched: the images after each step of the sampler, to show while they are drawn."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt8

from bitgen.generators.bigr import BiGR
from bitgen.generators.bitdance import BitDance
from bitgen.images.pixels import to_uint8
from bitgen.nn.matmul import cast_kernels
from bitgen.samplers import masked
from bitgen.samplers.images import Plan, sampler_of

Bits = Bool[Array, "b h w k"]

Drawn = Bool[Array, "b h w"]


def _embed(generator, params, labels):
    return generator.apply({"params": params}, labels, method="embed_labels")


def _decode(tokenizer, params, bits):
    return to_uint8(tokenizer.apply({"params": params}, bits, method="decode"))


# The static arguments are the modules, the plan and the window: equal ones share a program.
_iteration = jax.jit(masked.iteration, static_argnums=(0, 4, 5))

_sampled = jax.jit(
    lambda generator, *inputs: sampler_of(generator)(generator, *inputs), static_argnums=(0, 4)
)

_cast = jax.jit(cast_kernels, static_argnums=1)

_embed, _decode = (jax.jit(function, static_argnums=0) for function in (_embed, _decode))


@jax.jit
def _veiled(images, drawn):
    """Images with grey in place of the tokens that are not drawn yet."""
    cells = jax.image.resize(drawn, images.shape[:3], "nearest")
    return jnp.where(cells[..., None], images, jnp.full((), 96, jnp.uint8))


def progressive_bits(
    generator: Any, params: Any, labels: Any, keys: PRNGKeyArray, plan: Any
) -> Iterator[tuple[Bits, Drawn]]:
    """Yields the bits and which tokens are drawn after each step; the last are all of the image.

    The last bits are those that the family's `sample_bits` gives. A BiGR is watched at work;
    BitDance, in whose loop a token takes too little time to stop at, is replayed in its order; of
    any other family there is the last alone.
    """
    if isinstance(generator, BitDance):
        yield from _replayed(generator, params, labels, keys, plan)
        return
    if not isinstance(generator, BiGR):
        bits = _sampled(generator, params, jnp.asarray(labels), keys, plan)
        yield bits, jnp.ones(bits.shape[:3], bool)
        return
    params = _cast(params, generator.dtype)
    classes = _embed(generator, params, jnp.asarray(labels))
    classes, (bits, mask), parts = masked.begin(generator, params, classes, plan)
    shape = (len(classes), *generator.grid)
    for window, xs in parts:
        for x in zip(*xs, strict=True):
            bits, mask = _iteration(generator, params, classes, keys, plan, window, (bits, mask), x)
            yield bits.reshape(*shape, -1), ~mask.reshape(shape)


def progressive_images(
    generator: tuple[Any, Any],
    tokenizer: tuple[Any, Any],
    labels: Int[Array, " b"] | Int[np.ndarray, " b"],
    keys: PRNGKeyArray,
    plan: Plan,
    every: int = 1,
) -> Iterator[tuple[UInt8[np.ndarray, "b S S c"], Bool[np.ndarray, "b h w"]]]:
    """Yields the images after each step, grey where nothing is drawn yet, and the tokens drawn.

    Args:
      generator: module and parameters.
      tokenizer: module and parameters.
      labels: of the images.
      keys: one key an image.
      plan: settings of the sampler.
      every: steps between two that are shown; the last is shown always.
    """
    module, params = tokenizer
    step, shown, latest = 0, 0, None
    for step, latest in enumerate(progressive_bits(*generator, labels, keys, plan), 1):
        if step % every == 0:
            bits, drawn = latest
            yield jax.device_get((_veiled(_decode(module, params, bits), drawn), drawn))
            shown = step
    if latest is not None and shown != step:
        bits, drawn = latest
        yield jax.device_get((_decode(module, params, bits), drawn))


def _replayed(generator: BitDance, params, labels, keys, plan) -> Iterator[tuple[Bits, Drawn]]:
    bits = _sampled(generator, params, jnp.asarray(labels), keys, plan)
    groups = generator.tokens // generator.together
    # The number of its group at each bit of a token, arranged as the bits are.
    numbers = jnp.arange(groups)[None, :, None, None]
    shape = (1, groups, generator.together, generator.token_bits)
    order = generator.arrange(jnp.broadcast_to(numbers, shape))
    for group in range(groups):
        drawn = jnp.broadcast_to(order[..., 0] <= group, bits.shape[:3])
        yield bits & drawn[..., None], drawn
