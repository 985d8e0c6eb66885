"""From labels to images: a sampler and a tokenizer's decoder as one program over a mesh."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Int, PRNGKeyArray, UInt8

from bitgen.errors import UserError, choose
from bitgen.generators.bigr import BiGR
from bitgen.generators.bitdance import BitDance
from bitgen.images.pixels import to_uint8
from bitgen.runtime.distributed import fetch_global, place
from bitgen.runtime.mesh import BATCH, batch_sharding, round_up_batch
from bitgen.samplers import autoregressive, masked
from bitgen.samplers.autoregressive import AutoregressivePlan
from bitgen.samplers.masked import MaskedPlan

Plan = MaskedPlan | AutoregressivePlan


class Sampler(NamedTuple):
    """How a family of generators is sampled."""

    module: type
    plan: type[Plan]  # the settings
    sample_bits: Callable[..., jax.Array]  # (module, params, labels [b], keys [b], plan) -> bits


SAMPLERS = {
    "bigr": Sampler(BiGR, MaskedPlan, masked.sample_bits),
    "bitdance": Sampler(BitDance, AutoregressivePlan, autoregressive.sample_bits),
}


def sample_images(
    generator: Any,
    tokenizer: Any,
    labels: Int[np.ndarray, " n"],
    plan: Plan,
    mesh: Mesh,
    *,
    seed: int,
    first: int = 0,
    batch_size: int = 64,
    decode_batch: int = 0,
) -> Iterator[UInt8[np.ndarray, "b H W c"]]:
    """Yields the images of `labels[first:]` in order, batch by batch, on every process.

    Args:
      generator: a loaded model; its `params` may be what `prepare` returned.
      tokenizer: a loaded model.
      labels: the class of each image.
      plan: settings of the sampler.
      mesh: devices that share each batch.
      seed: an image depends on the seed, its index and its label, not on batches or devices.
      first: index of the first image to draw.
      batch_size: number of images drawn together.
      decode_batch: number of images that a device decodes together; 0: all of its batch.
    """
    params = prepare(generator.module, generator.params)
    batches = label_batches(labels, seed, mesh, first=first, batch_size=batch_size)
    sampler = image_sampler(generator.module, tokenizer.module, plan, mesh, decode_batch)
    for batch in batches:
        images = sampler(params, tokenizer.params, batch.labels, batch.keys)
        yield fetch_global(images)[: batch.count]


class LabelBatch(NamedTuple):
    """One batch of images to draw; the rows from `count` on are padding."""

    labels: Int[np.ndarray, " b"]
    keys: PRNGKeyArray  # [b]
    count: int


def label_batches(
    labels: Int[np.ndarray, " n"], seed: int, mesh: Mesh, *, first: int = 0, batch_size: int = 64
) -> Iterator[LabelBatch]:
    """Yields `labels[first:]` in batches of one size, so that they all use one compiled program."""
    total = len(labels)
    size = round_up_batch(min(batch_size, total), mesh)
    for start in range(first, total, size):
        indices = np.arange(start, start + size)
        rows = labels[np.minimum(indices, total - 1)]
        yield LabelBatch(rows, image_keys(seed, indices), min(size, total - start))


def image_keys(seed: int, indices: np.ndarray) -> jax.Array:
    """Returns one key for each image, which depends only on the seed and the image's index."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.asarray(indices))


@functools.lru_cache(maxsize=8)  # equal modules, plans and meshes share one compiled program
def image_sampler(
    generator: Any, tokenizer: Any, plan: Plan, mesh: Mesh, decode_batch: int = 0
) -> Callable[[Any, Any, np.ndarray, jax.Array], jax.Array]:
    """Returns f(generator params, tokenizer params, labels [b], keys [b]) -> uint8 [b, H, W, 3].

    The generator's parameters may be what `prepare` returned. b must be a multiple of the devices
    that share a batch. `decode_batch` limits how many images a device decodes at once; 0: no limit.
    """
    sample_bits = sampler_of(generator).sample_bits

    def sample(generator_params, tokenizer_params, labels, keys):
        bits = sample_bits(generator, generator_params, labels, keys, plan)

        def decode(bits):
            return to_uint8(tokenizer.apply({"params": tokenizer_params}, bits, method="decode"))

        if not 0 < decode_batch < len(bits):
            return decode(bits)
        return jax.lax.map(lambda one: decode(one[None])[0], bits, batch_size=decode_batch)

    specs = (P(), P(), BATCH, BATCH)
    program = jax.jit(
        jax.shard_map(sample, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)
    )

    def run(generator_params, tokenizer_params, labels, keys):
        labels, keys = place((jnp.asarray(labels), keys), batch_sharding(mesh))
        return program(generator_params, tokenizer_params, labels, keys)

    return run


def prepare(generator: Any, params: Any, platform: str = "") -> Any:
    """Returns parameters in the layout that samplers read fastest; call it once per model.

    Only BitDance has such a layout (see `autoregressive.prepare`).
    """
    if isinstance(generator, BitDance) and not isinstance(params, autoregressive.Prepared):
        prepared = functools.partial(autoregressive.prepare, generator, platform=platform)
        return jax.jit(prepared)(params)
    return params


# ------------------------------------------------------------------------------------- settings
def default_plan(family: str) -> Plan:
    """Returns the default settings of a family's sampler."""
    return choose("generator", family, SAMPLERS).plan()


def make_plan(generator: Any, settings: Mapping[str, Any]) -> Plan:
    """Returns a generator's plan; raises UserError if the settings belong to another family."""
    family, sampler = _family_of(generator)
    names = [field.name for field in dataclasses.fields(sampler.plan)]
    if sorted(settings) != sorted(names):
        raise UserError(
            f"config.sampler has {sorted(settings)}, but the sampler of {family} takes "
            f"{sorted(names)}: start from a config of {family}, such as configs/{family}.py"
        )
    return sampler.plan(**settings)


def sampler_of(generator: Any) -> Sampler:
    """Returns the sampler of a generator's family."""
    return _family_of(generator)[1]


def _family_of(generator: Any) -> tuple[str, Sampler]:
    return next(item for item in SAMPLERS.items() if isinstance(generator, item[1].module))
