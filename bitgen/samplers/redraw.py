"""Draws chosen tokens of an image again: the masked sampler, started from known bits."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int, UInt8

from bitgen.images.pixels import from_uint8, to_uint8
from bitgen.runtime.mesh import BATCH, batch_sharding, replicated, round_up_batch
from bitgen.runtime.progress import ProgressBar
from bitgen.samplers.images import image_keys
from bitgen.samplers.masked import MaskedPlan, sample_bits

_PASSES = 4  # each draws a quarter of every block


@dataclasses.dataclass(frozen=True)
class RedrawJob:
    """Images to draw from the same known bits, each with its class and its key."""

    classes: Float[Array, "j d"]
    indices: Int[np.ndarray, " j"]  # of the images' keys
    known: Bool[np.ndarray, "h w k"]
    # Masks [h, w] that are drawn one after another; an image is made after each round of masks.
    rounds: list[list[Bool[np.ndarray, "h w"]]]


def redraw_images(
    generator: Any,
    tokenizer: Any,
    job: RedrawJob,
    plan: MaskedPlan,
    mesh: Mesh,
    *,
    seed: int = 0,
    batch_size: int = 32,
) -> tuple[Bool[np.ndarray, "j r h w k"], UInt8[np.ndarray, "j r S S 3"]]:
    """Returns the bits and the decoded image of each image of a job after each round.

    Args:
      generator: a loaded BiGR.
      tokenizer: a loaded tokenizer.
      job: what to draw.
      plan: settings of the sampler, used for each mask.
      mesh: devices that share a batch; every device holds the parameters.
      seed: an image depends on the seed and its index, not on batch size or devices.
      batch_size: number of images drawn together, rounded up to a multiple of the devices.
    """
    redraw, decode = make_redraw(generator.module, plan, mesh), _decoder(tokenizer.module, mesh)
    total, passes = len(job.indices), sum(map(len, job.rounds))
    size = round_up_batch(min(batch_size, total), mesh)
    bits, images = [], []
    starts = range(0, total, size)
    with ProgressBar("drew", len(starts) * passes, unit="passes") as bar:
        for start in starts:
            # The last batch is padded, so that all use one compiled program.
            rows = np.minimum(np.arange(start, start + size), total - 1)
            keys, classes = image_keys(seed, job.indices[rows]), job.classes[rows]
            state, after, drawn = np.repeat(job.known[None], size, axis=0), [], 0
            for masks in job.rounds:
                for mask in masks:
                    # With one mask the keys are those of `sample`: same key and class, same image.
                    own = _fold(keys, drawn) if passes > 1 else keys
                    state = redraw(generator.params, classes, state, own, mask)
                    drawn += 1
                    jax.block_until_ready(state)
                    bar.add(1)
                after.append(decode(tokenizer.params, state))
            made = jax.tree.map(lambda *x: np.stack(x, axis=1), *jax.device_get(after))
            bits.append(made[0][: total - start])
            images.append(made[1][: total - start])
    return np.concatenate(bits), np.concatenate(images)


# Equal modules, plans and meshes share a program: a second edit does not compile again.
@functools.lru_cache(maxsize=8)
def make_redraw(generator: Any, plan: MaskedPlan, mesh: Mesh):
    """Returns f(params, classes [b,d], known [b,h,w,k], keys [b], mask [h,w]) -> bits [b,h,w,k].

    All images draw the tokens of one mask. b must be a multiple of the devices that share a batch.
    Masks with the same number of tokens share a compiled program.
    """

    def draw(params, classes, known, keys, mask, masked):
        def local(params, classes, known, keys, mask):
            mask = jnp.broadcast_to(mask[None], known.shape[:3])
            return sample_bits(
                generator, params, classes, keys, plan, known=known, mask=mask, masked=masked
            )

        specs = (P(), BATCH, BATCH, BATCH, P())
        return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=BATCH, check_vma=False)(
            params, classes, known, keys, mask
        )

    program, sharding = jax.jit(draw, static_argnames="masked"), batch_sharding(mesh)

    def run(params, classes, known, keys, mask):
        classes, known, keys = jax.device_put((classes, known, keys), sharding)
        return program(params, classes, known, keys, mask, masked=int(mask.sum()))

    return run


@functools.lru_cache(maxsize=8)
def _decoder(tokenizer: Any, mesh: Mesh):
    """Returns f(params, bits [b,h,w,k]) -> the bits and uint8 images [b,S,S,3], on every host."""

    def decode(params, bits):
        return bits, to_uint8(tokenizer.apply({"params": params}, bits, method="decode"))

    mapped = jax.shard_map(
        decode, mesh=mesh, in_specs=(P(), BATCH), out_specs=(BATCH, BATCH), check_vma=False
    )
    return jax.jit(mapped, out_shardings=replicated(mesh))


def _fold(keys, index: int):
    return jax.vmap(jax.random.fold_in, (0, None))(keys, index)


def encode_view(
    tokenizer: Any, params: Any, view: UInt8[np.ndarray, "S S 3"], mesh: Mesh
) -> tuple[Bool[np.ndarray, "h w k"], UInt8[np.ndarray, "S S 3"]]:
    """Returns the bits of a picture, and its reconstruction."""
    return jax.device_get(_round_trip(tokenizer, mesh)(params, view[None]))


@functools.lru_cache(maxsize=8)
def _round_trip(tokenizer: Any, mesh: Mesh):
    def encode(params, images):
        bits = tokenizer.apply({"params": params}, from_uint8(images), method="encode")
        images = tokenizer.apply({"params": params}, bits, method="decode")
        return bits[0], to_uint8(images)[0]

    return jax.jit(encode, out_shardings=replicated(mesh))


# ------------------------------------------------------------------------ masks and mixed classes
def cells_of(pixels: Bool[np.ndarray, "H W"], grid: tuple[int, int]) -> Bool[np.ndarray, "h w"]:
    """Returns the value at each cell's first pixel: nearest neighbour, as BiGR reduces masks."""
    rows, columns = (
        np.arange(cells) * side // cells for cells, side in zip(grid, pixels.shape, strict=True)
    )
    return pixels[rows[:, None], columns[None]]


def block_masks(
    grid: tuple[int, int], side: int, rng: np.random.Generator
) -> list[Bool[np.ndarray, "h w"]]:
    """Returns masks that hold each token once: a quarter of each block's places, shuffled.

    Blocks are `side` x `side` tokens; those at the grid's edge may be smaller.
    """
    place = np.add.outer(np.arange(grid[0]) % side * side, np.arange(grid[1]) % side)
    order = rng.permutation(side * side)
    masks = [np.isin(place, order[first::_PASSES]) for first in range(_PASSES)]
    return [mask for mask in masks if mask.any()]


def mixing_ratios(steps: int) -> Float[np.ndarray, " r"]:
    """Returns shares of the second class from 0 to 1; 0 steps: BiGR's 27, denser in the middle."""
    if steps:
        return np.linspace(0, 1, steps)
    return np.concatenate([[0.0, 0.1, 0.2], np.linspace(0.3, 0.7, 21), [0.8, 0.9, 1.0]])


def mix_classes(
    generator: Any, params: Any, first: int, second: int, ratios: Float[np.ndarray, " r"]
) -> Float[Array, "r d"]:
    """Returns class embeddings between two classes: the first at ratio 0, the second at ratio 1."""
    labels = jnp.array([first, second])
    ends = generator.apply({"params": params}, labels, method="embed_labels")
    share = jnp.asarray(ratios, jnp.float32)[:, None]
    return (1 - share) * ends[:1] + share * ends[1:]
