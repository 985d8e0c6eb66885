"""FID of few images, for a training loop to call on a schedule."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from bitgen.errors import UserError
from bitgen.evaluation.features import Extractor, make_extractor
from bitgen.evaluation.frechet import frechet_distance
from bitgen.evaluation.image_sets import pixels, read_images, read_share
from bitgen.evaluation.statistics import (
    Gaussian,
    Moments,
    Summary,
    merge_over_hosts,
    read_statistics,
    write_statistics,
)
from bitgen.runtime.logging import log_info
from bitgen.runtime.progress import with_progress


def small_fid(
    batches: Iterable[UInt8[np.ndarray, "b H W 3"]], reference: Gaussian, extractor: Extractor
) -> dict[str, float]:
    """Returns `fid` of images against a reference, and `fid_images`, how many they were.

    With few images FID is too high, by an amount that depends on their number: compare it along one
    run only. Over several processes each gives its own images, of at most `extractor.rows` a batch
    and as many batches as the others; all get the same number.
    """
    moments = _moments(batches, extractor)
    distance = frechet_distance(moments.gaussian(), reference)
    return {"fid": distance, "fid_images": float(moments.count)}


def data_reference(
    config_data: Any, extractor: Extractor, *, split: str = "train", images: int = 0
) -> Gaussian:
    """Returns the statistics of a split of `config.data` for `small_fid`; `images` 0: of all.

    Every process computes its share and gets the whole.
    """
    batches = data_pass(config_data, extractor.rows, split=split, images=images)
    return _moments(pixels(batches), extractor).gaussian()


def data_pass(
    config_data: Any, rows: int, *, split: str, images: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's share of a split of `config.data`, `rows` a batch or fewer.

    images: so many at most, evenly spread over the split; 0: all.
    """
    batches = read_share(config_data, split, limit=images, rows=rows)
    try:
        yield from batches
    finally:
        batches.close()


@dataclasses.dataclass
class ScheduledFid:
    """What `config.train.fid_every` measures; `start` makes one."""

    name: str  # fid | rfid
    make: Any  # averaged parameters -> an iterator over the batches of uint8 images they make
    reference: Gaussian
    extractor: Extractor

    def measure(self, params: Any) -> dict[str, float]:
        """Returns `fid` or `rfid` of what the parameters make, and `fid_images`."""
        found = small_fid(self.make(params), self.reference, self.extractor)
        return {self.name: found["fid"], "fid_images": found["fid_images"]}


def check(config: Any, mesh: Mesh) -> Extractor | None:
    """Returns the extractor that a run needs, None if `config.train.fid_every` is 0.

    Raises UserError if the weights are missing or the settings make no sense: to be called before
    anything that takes long.
    """
    settings = config.train
    if not settings.fid_every:
        return None
    if settings.fid_images < 2:
        raise UserError(
            f"config.train.fid_images={settings.fid_images}: FID needs two images at least; "
            "config.train.fid_every=0 measures none"
        )
    try:
        how = config.evaluate
        return make_extractor(how.protocol, how.weights, mesh, how.batch_size)
    except UserError as e:
        raise UserError(f"config.train.fid_every={settings.fid_every} measures FID: {e}") from None


def start(config: Any, task: Any, mesh: Mesh, extractor: Extractor, workdir: Path) -> ScheduledFid:
    """Returns the FID of a task of `training/`, whose reference is computed once in a workdir.

    A tokenizer's are the images that it reconstructs, a generator's `config.evaluate.reference`, or
    the split that it learns from, `config.evaluate.images` of it. Every process must call it.
    """
    count, rows = config.train.fid_images, extractor.rows
    make = task.image_maker(mesh, rows, count)
    whole = task.fid_name == "fid"  # a generator is compared with all of its data
    if whole and config.evaluate.reference:
        reference = _file_reference(config.evaluate.reference, extractor)
        return ScheduledFid(task.fid_name, make, reference, extractor)
    limit = config.evaluate.images if whole else count
    identity = {
        "data": config.data.to_dict(),
        "images": limit,
        "origin": task.info.get("origin"),
        "protocol": extractor.protocol,
        "weights": extractor.digest,
    }
    hashed = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
    path = workdir / f"fid_reference_{hashed}.npz"
    if path.is_file():
        seen = read_statistics(path, extractor.protocol, extractor.digest)
    else:
        images = task.real_images(mesh, rows, limit)
        several = jax.process_count()
        told = with_progress(
            images, f"reference of {task.fid_name}:", limit or None, lambda x: len(x) * several
        )
        moments = _moments(told, extractor)
        pool = moments.gaussian()
        seen = Summary(moments.count, pool)
        if jax.process_index() == 0:
            write_statistics(path, seen, extractor.protocol, extractor.digest)
        log_info(f"the reference of {task.fid_name} is {seen.count} images of config.data")
    assert seen is not None
    return ScheduledFid(task.fid_name, make, seen.pool, extractor)


def _file_reference(path: str, extractor: Extractor) -> Gaussian:
    """Of an npz file with statistics or images, or of a folder."""
    known = None
    if not Path(path).is_dir():
        known = read_statistics(path, extractor.protocol, extractor.digest)
    if known is not None:
        return known.pool
    moments = Moments(extractor.size)
    for features in extractor.stream(read_images(path, extractor.rows)[1]):
        moments.add(features["pool"])
    return moments.gaussian()


def _moments(batches: Iterable[np.ndarray], extractor: Extractor) -> Moments:
    """Of the images of all processes."""
    moments = Moments(extractor.size)
    for images in batches:
        moments.add(extractor(images)["pool"])
    return merge_over_hosts(moments)
