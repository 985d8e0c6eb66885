"""Labels in, images out: a sampler and a tokenizer's decoder as one program over the mesh."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from bitgen.errors import UserError, choose
from bitgen.generators.bigr import BiGR
from bitgen.generators.bitdance import BitDance
from bitgen.images.pixels import to_uint8
from bitgen.runtime.distributed import place
from bitgen.runtime.mesh import BATCH, batch_sharding
from bitgen.samplers import autoregressive, masked
from bitgen.samplers.autoregressive import AutoregressivePlan
from bitgen.samplers.masked import MaskedPlan

Plan = MaskedPlan | AutoregressivePlan
# Family -> module, settings of its sampler, and the sampler.
SAMPLERS: dict[str, tuple[type, type[Plan], Callable[..., jax.Array]]] = {
    "bigr": (BiGR, MaskedPlan, masked.sample_bits),
    "bitdance": (BitDance, AutoregressivePlan, autoregressive.sample_bits),
}


def default_plan(family: str) -> Plan:
    """Returns the settings of a family's sampler with their defaults."""
    return choose("generator", family, SAMPLERS)[1]()


def make_plan(generator: Any, settings: Mapping[str, Any]) -> Plan:
    """Returns the plan for a generator; raises UserError if the settings are another family's."""
    family, (_, plan, _) = _family_of(generator)
    names = [field.name for field in dataclasses.fields(plan)]
    if sorted(settings) != sorted(names):
        raise UserError(
            f"config.sampler has {sorted(settings)}, but the sampler of {family} takes "
            f"{sorted(names)}: start from a config of {family}, such as configs/{family}.py"
        )
    return plan(**settings)


def sampler_of(generator: Any) -> Callable[..., jax.Array]:
    """Returns f(generator, params, labels [b], keys [b], plan) -> bits of a family."""
    return _family_of(generator)[1][2]


def _family_of(generator: Any) -> tuple[str, tuple[type, type[Plan], Callable[..., jax.Array]]]:
    return next(item for item in SAMPLERS.items() if isinstance(generator, item[1][0]))


def image_keys(seed: int, indices: np.ndarray) -> jax.Array:
    """Returns one key an image, from its index alone: no batch size or mesh changes it."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices))


def prepare(generator: Any, params: Any, platform: str = "") -> Any:
    """Returns what samplers take in place of parameters, worth making once for many calls.

    Only BitDance's are others (see `autoregressive.prepare`).
    """
    if isinstance(generator, BitDance):
        prepared = functools.partial(autoregressive.prepare, generator, platform=platform)
        return jax.jit(prepared)(params)
    return params


def image_sampler(
    generator: Any, tokenizer: Any, plan: Plan, mesh: Mesh, decode_batch: int = 0
) -> Callable[[Any, Any, np.ndarray, jax.Array], jax.Array]:
    """Returns f(generator params, tokenizer params, labels [b], keys [b]) -> uint8 [b, H, W, 3].

    The generator's parameters may be what `prepare` made of them. b must be a multiple of the
    devices that split a batch. `decode_batch` bounds how many images a device decodes at a time;
    0: all.
    """
    sample_bits = sampler_of(generator)

    def sample(generator_params, tokenizer_params, labels, keys):
        bits = sample_bits(generator, generator_params, labels, keys, plan)

        def decode(bits):
            return to_uint8(tokenizer.apply({"params": tokenizer_params}, bits, method="decode"))

        if not 0 < decode_batch < len(bits):
            return decode(bits)
        return jax.lax.map(lambda one: decode(one[None])[0], bits, batch_size=decode_batch)

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
        labels, keys = place((jnp.asarray(labels), keys), sharding)
        return program(generator_params, tokenizer_params, labels, keys)

    return run
