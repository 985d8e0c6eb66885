"""Labels in, images out: a sampler and a tokenizer's decoder as one program over the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bitgen.mesh import BATCH, batch_sharding
from bitgen.pixels import to_uint8
from bitgen.samplers.masked import MaskedPlan, sample_bits


def image_keys(seed: int, indices: np.ndarray) -> jax.Array:
    """Returns one key an image, from its index alone: no batch size or mesh changes it."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices))


def image_sampler(
    generator: Any, tokenizer: Any, plan: MaskedPlan, mesh: Mesh
) -> Callable[[Any, Any, np.ndarray, jax.Array], jax.Array]:
    """Returns f(generator params, tokenizer params, labels [b], keys [b]) -> uint8 [b, H, W, 3].

    b must be a multiple of the devices that split a batch.
    """

    def sample(generator_params, tokenizer_params, labels, keys):
        bits = sample_bits(generator, generator_params, labels, keys, plan)
        images = tokenizer.apply({"params": tokenizer_params}, bits, method="decode")
        return to_uint8(images)

    program = jax.jit(
        jax.shard_map(
            sample,
            mesh=mesh,
            in_specs=(P(), P(), BATCH, BATCH),
            out_specs=BATCH,
            check_vma=False,
        )
    )
    sharding = batch_sharding(mesh)

    def run(generator_params, tokenizer_params, labels, keys):
        labels, keys = jax.device_put((jnp.asarray(labels), keys), sharding)
        return program(generator_params, tokenizer_params, labels, keys)

    return run
