"""Distances between two sets of features: Fréchet (FID, sFID, rFID) and kernel (KID)."""

import numpy as np
from jaxtyping import Float

from bitgen.errors import UserError
from bitgen.evaluation.statistics import Gaussian


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """Returns |m1 - m2|^2 + tr(S1 + S2 - 2 sqrt(S1 S2)) (Heusel et al., arXiv 1706.08500).

    The trace of the root is the sum of the singular values of R1' R2, where S = R R'. That is exact
    also where the product has no finite root, as with fewer images than dimensions.
    Raises UserError if the sizes differ or a value is not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"features of different sizes, {len(a.mean)} and {len(b.mean)}: both sets need the "
            "same protocol"
        )
    for side in (a, b):
        if not (np.isfinite(side.mean).all() and np.isfinite(side.covariance).all()):
            raise UserError("statistics hold NaN or infinity: look at the images, or make new ones")
    cross = np.linalg.svd(_root(a.covariance).T @ _root(b.covariance), compute_uv=False).sum()
    mean = np.sum(np.square(a.mean - b.mean))
    return float(mean + np.trace(a.covariance) + np.trace(b.covariance) - 2 * cross)


def _root(covariance: np.ndarray) -> np.ndarray:
    """-> [d, rank], whose product with its transpose is the covariance."""
    values, vectors = np.linalg.eigh(np.asarray(covariance, np.float64))
    # Rounding errors of zeros are left out: their roots would not be small.
    real = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0)
    return vectors[:, real] * np.sqrt(values[real])


def kernel_distance(
    a: Float[np.ndarray, "n d"],
    b: Float[np.ndarray, "m d"],
    *,
    subsets: int = 100,
    size: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns KID, mean and deviation over random subsets (Binkowski et al., arXiv 1801.01401).

    The unbiased squared MMD with the kernel (x'y / d + 1)^3; a subset has `size` rows of each set,
    or all rows of a smaller one. Raises UserError if the sizes of features differ.
    """
    if a.shape[1] != b.shape[1]:
        raise UserError(f"features of different sizes, {a.shape[1]} and {b.shape[1]}")
    size = min(size, len(a), len(b))
    if size < 2:
        raise UserError("KID needs at least two images in each set")
    generator = np.random.default_rng(seed)
    values = []
    for _ in range(subsets):
        x = a[generator.choice(len(a), size, replace=False)].astype(np.float64)
        y = b[generator.choice(len(b), size, replace=False)].astype(np.float64)
        xx, yy, xy = (_cubic(u, v) for u, v in ((x, x), (y, y), (x, y)))
        own = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        values.append(own / (size * (size - 1)) - 2 * xy.mean())
    return float(np.mean(values)), float(np.std(values))


def _cubic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    base = x @ y.T / x.shape[1] + 1
    return base * base * base  # numpy's power takes twenty times as long
