"""Progressive sampling: the images after each step of the sampler."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Int, PRNGKeyArray, UInt8

from bitgen.generators.bigr import BiGR
from bitgen.generators.bitdance import BitDance
from bitgen.images.pixels import to_uint8
from bitgen.nn.matmul import cast_kernels
from bitgen.runtime.mesh import batch_sharding
from bitgen.samplers import masked
from bitgen.samplers.images import Plan, label_batches, sampler_of

Bits = Bool[Array, "b h w k"]
Drawn = Bool[Array, "b h w"]


def progressive_images(
    generator: Any,
    tokenizer: Any,
    labels: Int[np.ndarray, " n"],
    plan: Plan,
    mesh: Mesh,
    *,
    seed: int,
    every: int = 1,
) -> Iterator[tuple[UInt8[np.ndarray, "n H W c"], Bool[np.ndarray, "n h w"]]]:
    """Yields the images after each step, grey where nothing is drawn yet, and the drawn tokens.

    The last images equal those of `samplers.images.sample_images` for the same arguments.

    Args:
      generator: a loaded model.
      tokenizer: a loaded model.
      labels: the class of each image; all images are one batch.
      plan: settings of the sampler.
      mesh: devices of this process that share the batch.
      seed: of the images.
      every: yield one of `every` steps; the last step is always yielded.
    """
    (batch,) = label_batches(labels, seed, mesh, batch_size=len(labels))
    rows, keys = jax.device_put((batch.labels, batch.keys), batch_sharding(mesh))
    step, pending = 0, None
    for bits, drawn in progressive_bits(generator.module, generator.params, rows, keys, plan):
        step, pending = step + 1, (bits, drawn)
        if step % every == 0:
            yield _show(tokenizer, bits, drawn, batch.count)
            pending = None
    if pending is not None:
        yield _show(tokenizer, *pending, batch.count)


def progressive_bits(
    generator: Any, params: Any, labels: Any, keys: PRNGKeyArray, plan: Any
) -> Iterator[tuple[Bits, Drawn]]:
    """Yields the bits and the drawn tokens after each step; the last step has drawn all of them.

    The last bits equal those of the family's `sample_bits`. BiGR is stopped after each iteration.
    BitDance, whose steps are too short for that, is sampled first and then replayed in its order.
    Other families yield only their last step.
    """
    if isinstance(generator, BiGR):
        yield from _masked_steps(generator, params, labels, keys, plan)
        return
    bits = _sample_bits(generator, params, labels, keys, plan)
    if isinstance(generator, BitDance):
        yield from _replay(generator, bits)
    else:
        yield bits, jnp.ones(bits.shape[:3], bool)


def _masked_steps(generator, params, labels, keys, plan):
    params = _cast(params, generator.dtype)
    classes = _embed(generator, params, labels)
    classes, (bits, mask), segments = masked.init_loop(generator, params, classes, plan)
    shape = (len(classes), *generator.grid)
    for window, xs in segments:
        for x in zip(*xs, strict=True):
            bits, mask = _iteration(generator, params, classes, keys, plan, window, (bits, mask), x)
            yield bits.reshape(*shape, -1), ~mask.reshape(shape)


def _replay(generator, bits):
    groups = generator.tokens // generator.together
    # The number of the group that each bit belongs to, arranged as the bits are.
    numbers = jnp.arange(groups)[None, :, None, None]
    shape = (1, groups, generator.together, generator.token_bits)
    order = generator.arrange(jnp.broadcast_to(numbers, shape))
    for group in range(groups):
        drawn = jnp.broadcast_to(order[..., 0] <= group, bits.shape[:3])
        yield bits & drawn[..., None], drawn


def _show(tokenizer, bits, drawn, count):
    images = _decode(tokenizer.module, tokenizer.params, bits, drawn)
    return tuple(rows[:count] for rows in jax.device_get((images, drawn)))


def _embed(generator, params, labels):
    return generator.apply({"params": params}, labels, method="embed_labels")


def _decode(tokenizer, params, bits, drawn):
    """Returns the decoded images, grey in place of tokens that are not drawn yet."""
    images = to_uint8(tokenizer.apply({"params": params}, bits, method="decode"))
    cells = jax.image.resize(drawn, images.shape[:3], "nearest")
    return jnp.where(cells[..., None], images, jnp.full((), 96, jnp.uint8))


# Modules, plans and windows are static arguments: equal ones share a compiled program.
_iteration = jax.jit(masked.iteration, static_argnums=(0, 4, 5))
_sample_bits = jax.jit(
    lambda generator, *inputs: sampler_of(generator).sample_bits(generator, *inputs),
    static_argnums=(0, 4),
)
_cast = jax.jit(cast_kernels, static_argnums=1)
_embed, _decode = (jax.jit(function, static_argnums=0) for function in (_embed, _decode))
