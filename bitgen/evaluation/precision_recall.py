"""Precision and recall of generated images (Kynkaanniemi et al., arXiv 1904.06991).

A set's manifold is the union of balls around its features, each as large as the distance to the
k-th nearest other feature. Precision is the share of samples in the reference's manifold, recall
the share of the reference in the samples'. Distances are computed in blocks, so that the 50,000 x
50,000 of them are never in memory together.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from bitgen.errors import UserError

BLOCK = 2048


def precision_recall(
    reference: Float[np.ndarray, "n d"],
    samples: Float[np.ndarray, "m d"],
    *,
    k: int = 3,
    block: int = BLOCK,
) -> tuple[float, float]:
    """Returns precision and recall as ADM's suite defines them, from float32 distances.

    ADM rounds features and distances to float16 where they fit, which changes its values by about
    0.002; bitgen does not. Raises UserError if the features differ in size, or a set has at most
    `k` rows.
    """
    if reference.shape[1] != samples.shape[1]:
        raise UserError(f"features of different sizes, {reference.shape[1]} and {samples.shape[1]}")
    if min(len(reference), len(samples)) <= k:
        raise UserError(
            f"precision and recall with k = {k} need more than {k} images in each set, got "
            f"{len(reference)} and {len(samples)}"
        )
    ours, theirs = _blocks(samples, block), _blocks(reference, block)
    our_radii = _radii(ours, len(samples), k)
    their_radii = _radii(theirs, len(reference), k)
    precision = _covered(ours, theirs, their_radii)[: len(samples)].mean()
    recall = _covered(theirs, ours, our_radii)[: len(reference)].mean()
    return float(precision), float(recall)


def _blocks(rows: np.ndarray, block: int) -> jax.Array:
    """Returns [blocks, block, d], the last block padded with zeros."""
    block = min(block, len(rows))
    count = -(-len(rows) // block)
    padded = np.zeros((count * block, rows.shape[1]), np.float32)
    padded[: len(rows)] = rows
    return jnp.asarray(padded.reshape(count, block, -1))


def _distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns squared distances, [x, y]."""
    product = jnp.matmul(x, y.T, precision=jax.lax.Precision.HIGHEST)
    x2, y2 = jnp.sum(jnp.square(x), axis=1), jnp.sum(jnp.square(y), axis=1)
    return jnp.maximum(x2[:, None] - 2 * product + y2[None], 0)


def _radii(blocks: jax.Array, count: int, k: int) -> np.ndarray:
    """Returns squared distances to the k-th nearest other row, [blocks, block]; padding has -1."""
    radii = np.stack([np.asarray(_block_radii(rows, blocks, count, k)) for rows in blocks])
    radii.reshape(-1)[count:] = -1
    return radii


@functools.partial(jax.jit, static_argnums=3)
def _block_radii(rows: jax.Array, blocks: jax.Array, count: Any, k: int) -> jax.Array:
    width = blocks.shape[1]

    def step(smallest, item):
        i, columns = item
        real = i * width + jnp.arange(width) < count
        distances = jnp.where(real[None], _distances(rows, columns), jnp.inf)
        both = jnp.concatenate([smallest, distances], axis=1)
        return -jax.lax.top_k(-both, k + 1)[0], None

    start = jnp.full((len(rows), k + 1), jnp.inf)
    smallest, _ = jax.lax.scan(step, start, (jnp.arange(len(blocks)), blocks))
    return smallest[:, k]  # the first is the row itself


def _covered(points: jax.Array, centres: jax.Array, radii: np.ndarray) -> np.ndarray:
    """Returns which points lie in the ball of at least one centre, bool [rows]."""
    placed = jnp.asarray(radii)
    return np.concatenate([np.asarray(_block_covered(rows, centres, placed)) for rows in points])


@jax.jit
def _block_covered(rows: jax.Array, centres: jax.Array, radii: jax.Array) -> jax.Array:
    def step(covered, item):
        columns, radius = item
        return covered | jnp.any(_distances(rows, columns) <= radius[None], axis=1), None

    covered, _ = jax.lax.scan(step, jnp.zeros(len(rows), bool), (centres, radii))
    return covered
