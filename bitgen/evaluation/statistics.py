"""Running statistics of features, float64 on the host.

A `Summary` is all that metrics need to know of a set of images.
"""

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bitgen.errors import UserError
from bitgen.files import atomic_path

_TOGETHER = 512  # rows whose outer products are summed at once
SPLIT = 5000  # images of a split of the Inception score


class Gaussian(NamedTuple):
    """Mean and covariance, which Fréchet distances compare."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


class Moments:
    """Count, mean and covariance of rows that come in batches of any size."""

    def __init__(self, size: int):
        self.count, self.mean = 0, np.zeros(size)
        self.scatter = np.zeros((size, size))  # summed outer products of deviations
        self._waiting: list[np.ndarray] = []

    def add(self, rows: Float[np.ndarray, "n d"]) -> None:
        """Adds rows."""
        self._waiting.append(np.asarray(rows))
        if sum(map(len, self._waiting)) >= _TOGETHER:
            self._flush()

    def _flush(self) -> None:
        rows = np.concatenate([*self._waiting, np.zeros((0, len(self.mean)))]).astype(np.float64)
        self._waiting = []
        if len(rows):
            mean = rows.mean(0)
            self._join(len(rows), mean, (rows - mean).T @ (rows - mean))

    def _join(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        # Chan, Golub and LeVeque (1979), which avoids the difference of large numbers.
        total, difference = self.count + count, mean - self.mean
        self.scatter += scatter
        self.scatter += np.outer(difference, difference) * (self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total

    def gaussian(self) -> Gaussian:
        """Returns mean and covariance (n - 1); raises UserError for fewer than two rows."""
        self._flush()
        if self.count < 2:
            raise UserError(f"statistics need at least two images, got {self.count}")
        return Gaussian(self.mean, self.scatter / (self.count - 1))


class Scores:
    """Sums for the Inception score, for each split of the images."""

    def __init__(self):
        self.sums: dict[int, list[Any]] = {}  # split -> count, sum p, sum p log p

    def add(self, logits: Float[np.ndarray, "n c"], splits: Int[np.ndarray, " n"]) -> None:
        """Adds the logits of images, and the split of each."""
        logits = np.asarray(logits, np.float64)
        logits = logits - logits.max(1, keepdims=True)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        p = np.exp(log_p)
        for split in np.unique(splits):
            rows = splits == split
            self._join(int(split), [rows.sum(), p[rows].sum(0), (p[rows] * log_p[rows]).sum()])

    def _join(self, split: int, sums: list[Any]) -> None:
        before = self.sums.get(split, [0, 0.0, 0.0])
        self.sums[split] = [a + b for a, b in zip(before, sums, strict=True)]

    def value(self) -> float:
        """Returns the mean over splits of exp(mean KL(p(y|x) || p(y)))."""
        scores = []
        for count, p, p_log_p in self.sums.values():
            mean = p / count
            entropy = np.sum(mean * np.log(np.maximum(mean, 1e-300)))
            scores.append(np.exp(p_log_p / count - entropy))
        return float(np.mean(scores))


@dataclass
class Summary:
    """The statistics of a set of images."""

    count: int
    pool: Gaussian
    spatial: Gaussian | None = None
    score: float | None = None  # Inception score, the splits spread over the images
    score_in_order: float | None = None  # with every 5,000 images in their order as a split
    features: Float[np.ndarray, "n d"] | None = None  # pool features of single images


def summarise(
    features: Iterable[dict[str, np.ndarray]], total: int, keep_every: int = 1
) -> Summary:
    """Returns the summary of a stream of features of about `total` images.

    The features of each `keep_every`-th image are kept; 0: none. ADM's Inception score takes every
    5,000 images in the order of the file as a split, and is far too low if they are in the order of
    their classes. A second one spreads the images over the same number of splits.
    """
    count, kept = 0, []
    moments: dict[str, Moments] = {}
    spread, in_order, splits = Scores(), Scores(), max(1, -(-total // SPLIT))
    for batch in features:
        if not moments:
            moments = {name: Moments(batch[name].shape[1]) for name in ("pool", "spatial")}
        for name, running in moments.items():
            running.add(batch[name])
        places = count + np.arange(len(batch["pool"]))
        spread.add(batch["logits"], places % splits)
        in_order.add(batch["logits"], places // SPLIT)
        if keep_every:
            kept.append(batch["pool"][-count % keep_every :: keep_every].copy())
        count += len(places)
    if count < 2:
        raise UserError(f"metrics need at least two images, got {count}")
    return Summary(
        count,
        moments["pool"].gaussian(),
        moments["spatial"].gaussian(),
        spread.value(),
        in_order.value(),
        np.concatenate(kept) if kept else None,
    )


# ------------------------------------------------------------------------------- files
def write_statistics(path: str | Path, summary: Summary, protocol: str, digest: str) -> None:
    """Writes mu, sigma, mu_s and sigma_s as in ADM's reference files, atomically.

    pytorch-fid reads mu and sigma from the same file. The protocol and the digest of the weights
    are stored too, so that `read_statistics` can refuse what is not comparable.
    """
    arrays: dict[str, Any] = {"mu": summary.pool.mean, "sigma": summary.pool.covariance}
    if summary.spatial is not None:
        arrays |= {"mu_s": summary.spatial.mean, "sigma_s": summary.spatial.covariance}
    with atomic_path(path) as part, part.open("wb") as file:
        np.savez(file, count=summary.count, protocol=protocol, weights=digest, **arrays)


def read_statistics(path: str | Path, protocol: str, digest: str) -> Summary | None:
    """Returns the statistics in an npz file, or None if it has none (but perhaps images, arr_0).

    Raises UserError if it cannot be read, or was made with another protocol or other weights.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no reference {path}; give an npz file or a folder of images")
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as arrays:
            names = set(arrays.files)
            wanted = names & {"mu", "sigma", "mu_s", "sigma_s", "count", "protocol", "weights"}
            held = {name: arrays[name] for name in wanted}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as e:
        raise UserError(f"{path} is not an npz file, or it is damaged: {e}") from None
    if not {"mu", "sigma"} <= names:
        return None
    made = str(held.get("protocol", protocol))
    if made != protocol:
        raise UserError(
            f"{path} has statistics of protocol {made}, not {protocol}: set "
            f"config.evaluate.protocol={made} or make new ones"
        )
    if str(held.get("weights", digest)) != digest:
        raise UserError(f"{path} has statistics of other weights, {held['weights']}: make new ones")
    pairs = {}
    for mean, covariance in (("mu", "sigma"), ("mu_s", "sigma_s")):
        if {mean, covariance} <= held.keys():
            a, b = (np.asarray(held[name], np.float64) for name in (mean, covariance))
            if b.shape != (*a.shape, *a.shape) or a.ndim != 1:
                raise UserError(f"{path}: {mean} {list(a.shape)} does not fit {list(b.shape)}")
            pairs[mean] = Gaussian(a, b)
    return Summary(int(held.get("count", 0)), pairs["mu"], pairs.get("mu_s"))
