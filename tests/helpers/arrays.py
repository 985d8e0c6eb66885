"""Arrays for comparisons with PyTorch, and statistics of rows."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bitgen.evaluation.statistics import Gaussian, Moments


def nhwc(array) -> np.ndarray:
    return np.ascontiguousarray(np.transpose(np.asarray(array), (0, 2, 3, 1)))


def nchw(array) -> torch.Tensor:
    return torch.from_numpy(np.transpose(np.asarray(array), (0, 3, 1, 2)).copy())


def images_like(shape, seed=0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32))


def close(actual, expected, rtol=0.0, atol=0.0):
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=rtol, atol=atol)


def gaussian(rows, batches=1) -> Gaussian:
    moments = Moments(rows.shape[1])
    for batch in np.array_split(rows, batches):
        moments.add(batch)
    return moments.gaussian()
