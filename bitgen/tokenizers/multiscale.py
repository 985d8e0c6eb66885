"""Multi-scale residual quantisation and the schedules of its scales (arXiv 2412.04431, 2404.02905).

At each scale, coarse to fine, the residual is averaged down to the scale's cells and quantised; the
codes are interpolated up to the whole grid and subtracted from the residual.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from bitgen.errors import UserError
from bitgen.tokenizers.quantizers import Spherical

Size = tuple[int, int]
Bits = tuple[Bool[Array, "b hs ws k"], ...]

# Infinity's scales for each aspect ratio, coarse to fine, and how many of them make a schedule.
_DYNAMIC_COUNTS = (7, 10, 13)
_DYNAMIC = (
    "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64",
    "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
)
_ORIGINAL = (
    "1x1 2x2 3x3 4x4 5x5 6x6 8x8 10x10 13x13 16x16",
    "1x1 2x2 3x3 4x4 6x6 9x9 13x13 18x18 24x24 32x32",
    "1x1 2x2 3x3 4x4 5x5 7x7 9x9 12x12 16x16 21x21 27x27 36x36 48x48 64x64",
    "1x1 2x2 3x3 4x4 6x6 9x12 13x16 18x24 24x32 32x48 36x64",
)
_DENSE_SIDES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64)
NAMES = ("dense", "dynamic", "original", "same1", "same2", "same3")


def scales_of(schedule: str | Sequence[Sequence[int]], grid: Size) -> tuple[Size, ...]:
    """Returns the sizes (h, w) of all scales for a grid, coarse to fine; the last is the grid.

    Args:
      schedule: 'original', 'dynamic' (also grids that are not square), 'dense' (every side up to
        16), 'sameN' (N scales of the grid itself, whatever it is), or the sizes themselves.
      grid: cells (h, w) of the finest scale.

    Raises UserError for another name, or a grid that the schedule does not have.
    """
    grid = (int(grid[0]), int(grid[1]))
    if not isinstance(schedule, str):
        return _explicit(schedule, grid)
    if same := re.fullmatch(r"same([1-9]\d*)", schedule):
        return (grid,) * int(same[1])
    if schedule not in NAMES:
        raise UserError(
            f"unknown schedule {schedule!r}, have {list(NAMES)} (any sameN), or a list of sizes"
        )
    found = _named(schedule)
    if grid not in found:
        raise UserError(
            f"schedule {schedule!r} has no scales for a grid of {_words([grid])} cells, only for "
            f"{_words(sorted(found))}; resize the images, or use 'same1' or a list of sizes"
        )
    return found[grid]


def _explicit(schedule: Sequence[Sequence[int]], grid: Size) -> tuple[Size, ...]:
    try:
        scales = tuple((int(h), int(w)) for h, w in schedule)
    except (TypeError, ValueError):
        raise UserError(f"a schedule is a name or a list of sizes (h, w), not {schedule}") from None
    if not scales or min(min(size) for size in scales) < 1 or scales[-1] != grid:
        raise UserError(
            f"schedule [{_words(scales)}] does not end in the grid of {_words([grid])} cells; "
            "every scale needs at least one cell, and the last is the grid"
        )
    return scales


def _named(schedule: str) -> dict[Size, tuple[Size, ...]]:
    """Returns grid -> scales of a schedule."""
    found = {scales[-1]: scales for scales in map(_sizes, _ORIGINAL)}
    if schedule == "dynamic":
        for tall, count in itertools.product(map(_sizes, _DYNAMIC), _DYNAMIC_COUNTS):
            wide = tuple((w, h) for h, w in tall)
            for scales in (wide[:count], tall[:count]):
                found[scales[-1]] = scales
    if schedule == "dense":
        for side in (16, 32, 64):
            found[side, side] = tuple((n, n) for n in _DENSE_SIDES if n <= side)
    return found


def _sizes(text: str) -> tuple[Size, ...]:
    pairs = (size.split("x") for size in text.split())
    return tuple((int(h), int(w)) for h, w in pairs)


def _words(sizes: Sequence[Size]) -> str:
    return " ".join(f"{h}x{w}" for h, w in sizes)


def area_downsample(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b hs ws c"]:
    """Returns the means of the cells that each new cell overlaps, PyTorch's mode 'area'."""
    return _resize(x, size, _area)


def linear_upsample(x: Float[Array, "b hs ws c"], size: tuple[int, int]) -> Float[Array, "b h w c"]:
    """Returns x interpolated bilinearly between cell centres, PyTorch's align_corners=False."""
    return _resize(x, size, _linear)


def _resize(x: Array, size: Size, matrix: Callable[[int, int], np.ndarray]) -> Array:
    if x.shape[1:3] == tuple(size):
        return x
    rows, columns = (matrix(n, m) for n, m in zip(x.shape[1:3], size, strict=True))
    # Full float32 on every backend, because signs depend on the result.
    return jnp.einsum("ij,bjwc,kw->bikc", rows, x, columns, precision=jax.lax.Precision.HIGHEST)


def _area(inputs: int, outputs: int) -> np.ndarray:
    """Weights [outputs, inputs] of the means over [floor(i r), ceil((i + 1) r)), r the ratio."""
    weights = np.zeros((outputs, inputs), np.float32)
    for i in range(outputs):
        first, end = i * inputs // outputs, -(-(i + 1) * inputs // outputs)
        weights[i, first:end] = 1 / (end - first)
    return weights


def _linear(inputs: int, outputs: int) -> np.ndarray:
    """Weights [outputs, inputs] of the two nearest cells; cells beyond the border repeat it."""
    # In float32, as PyTorch does.
    ratio = np.float32(inputs) / np.float32(outputs)
    position = np.maximum(ratio * (np.arange(outputs, dtype=np.float32) + 0.5) - 0.5, 0)
    below = np.minimum(position.astype(int), inputs - 1)
    above = np.minimum(below + 1, inputs - 1)
    weights = np.zeros((outputs, inputs), np.float32)
    np.add.at(weights, (np.arange(outputs), below), 1 - (position - below))
    np.add.at(weights, (np.arange(outputs), above), position - below)
    return weights


class MultiScaleQuantized(NamedTuple):
    """The output of a multi-scale quantiser in training."""

    codes: Float[Array, "b h w k"]  # float32, with straight-through gradients at every scale
    bits: Bits  # before flips, of dropped scales too
    losses: dict[str, Float[Array, ""]]  # entropy and commitment, means over the kept scales


@dataclasses.dataclass(frozen=True)
class MultiScale:
    """One quantiser, applied at each scale to the residual of the coarser scales.

    Scales are dropped and bits flipped in training only, where a key is given.
    """

    quantizer: Any = dataclasses.field(default_factory=Spherical)
    decay: bool = False  # the codes of scale s are weighted by 1 - s / 10, at least 0.1
    detach_residual: bool = True  # no gradient from later scales through the codes of earlier ones
    drop_rate: float = 0.0  # probability to drop a scale from a batch
    keep_first: bool = True
    keep_last: bool = False
    flip_prob: float = 0.0  # probability to flip a bit
    flip_scales: int = 1  # number of the first scales whose bits are flipped

    def __post_init__(self):
        """Raises UserError if all scales of a batch could be dropped."""
        if self.drop_rate > 0 and not (self.keep_first or self.keep_last):
            raise UserError("drop_rate above 0 needs keep_first or keep_last")

    def bits(self, z: Float[Array, "b h w k"], scales: Sequence[Size]) -> Bits:
        """Returns the bits of every scale, [b, h_s, w_s, k] each, without randomness."""
        return self(z, scales).bits

    def codes(self, bits: Bits, grid: Size) -> Float[Array, "b h w k"]:
        """Returns the sum of the given scales' codes, interpolated up to the grid."""
        return sum(
            linear_upsample(self.quantizer.codes(scale) * self._factor(i), grid)
            for i, scale in enumerate(bits)
        )  # pyright: ignore[reportReturnType]

    def __call__(
        self, z: Float[Array, "b h w k"], scales: Sequence[Size], key: PRNGKeyArray | None = None
    ) -> MultiScaleQuantized:
        """Returns codes, bits and losses; drops scales and flips bits with a `key` only."""
        residual = z.astype(jnp.float32)
        grid = (z.shape[1], z.shape[2])
        keep = jnp.ones(len(scales))
        if key is not None:
            drop_key, *flip_keys = jax.random.split(key, 1 + len(scales))
            keep = self._keep(drop_key, len(scales))
        total, all_bits, all_losses = jnp.zeros_like(residual), [], []
        for i, size in enumerate(scales):
            codes, bits, losses = self.quantizer(area_downsample(residual, size))
            if key is not None and self.flip_prob > 0 and i < self.flip_scales:
                flips = jax.random.bernoulli(flip_keys[i], self.flip_prob, bits.shape)
                codes = jnp.where(flips, -codes, codes)
            codes = linear_upsample(codes * (self._factor(i) * keep[i]), grid)
            explained = jax.lax.stop_gradient(codes) if self.detach_residual else codes
            residual = residual - explained
            total = total + codes
            all_bits.append(bits)
            all_losses.append(losses)
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *all_losses)
        losses = {name: jnp.sum(x * keep) / jnp.sum(keep) for name, x in stacked.items()}
        return MultiScaleQuantized(total, tuple(all_bits), losses)

    def _factor(self, scale: int) -> float:
        return max(0.1, 1 - 0.1 * scale) if self.decay else 1.0

    def _keep(self, key: PRNGKeyArray, count: int) -> Float[Array, " s"]:
        """Returns 1 for scales to keep and 0 for scales to drop, the same for a whole batch."""
        keep = jax.random.bernoulli(key, 1 - self.drop_rate, (count,))
        always = [i for i, on in ((0, self.keep_first), (count - 1, self.keep_last)) if on]
        return keep.at[np.array(always, int)].set(True).astype(jnp.float32)
