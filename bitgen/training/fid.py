"""FID of a few images on a schedule during training."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import UInt8

from bitgen.errors import UserError
from bitgen.evaluation.features import Extractor, make_extractor
from bitgen.evaluation.frechet import frechet_distance
from bitgen.evaluation.image_sets import read_images, read_share
from bitgen.evaluation.statistics import (
    Gaussian,
    Moments,
    Summary,
    read_statistics,
    write_statistics,
)
from bitgen.runtime.logging import log_info
from bitgen.runtime.progress import with_progress

Images = Iterable[UInt8[np.ndarray, "b H W 3"]]


def check(config: Any, mesh: Mesh) -> Extractor | None:
    """Returns the extractor that a run needs, None if `config.train.fid_every` is 0.

    Raises UserError if the weights are missing or the settings make no sense; call it early.
    """
    settings = config.train
    if not settings.fid_every:
        return None
    if settings.fid_images < 2:
        raise UserError(
            f"config.train.fid_images={settings.fid_images}: FID needs at least two images; "
            "config.train.fid_every=0 measures none"
        )
    try:
        how = config.evaluate
        return make_extractor(how.protocol, how.weights, mesh, how.batch_size)
    except UserError as e:
        raise UserError(f"config.train.fid_every={settings.fid_every} measures FID: {e}") from None


def start(
    config: Any, task: Any, mesh: Mesh, extractor: Extractor, workdir: Path
) -> Callable[[Any], dict[str, float]]:
    """Returns f(averaged parameters) -> `fid`, or `rfid` of a tokenizer, and `fid_images`.

    With few images FID is too high by an amount that depends on their number; compare it within one
    run only. The reference is that of `find_reference`. Every process must call this and f.
    """
    count = config.train.fid_images
    make = task.image_maker(mesh, extractor.rows, count)
    reference = find_reference(config, task, mesh, extractor, workdir)

    def measure(params: Any) -> dict[str, float]:
        moments = image_moments(make(params), extractor)
        distance = frechet_distance(moments.gaussian(), reference)
        return {task.fid_name: distance, "fid_images": float(moments.count)}

    return measure


def find_reference(
    config: Any, task: Any, mesh: Mesh, extractor: Extractor, workdir: Path
) -> Gaussian:
    """Returns the reference statistics of a task, computed once and kept in the workdir.

    A tokenizer is compared with the images that it reconstructs, a generator with
    `config.evaluate.reference` or with `config.evaluate.images` of its training split.
    """
    settings, generator = config.evaluate, task.fid_name == "fid"
    if generator and settings.reference:
        path, known = settings.reference, None
        if not Path(path).is_dir():
            known = read_statistics(path, extractor.protocol, extractor.digest)
        if known is not None:
            return known.pool
        return image_moments(read_images(path, extractor.rows)[1], extractor).gaussian()
    limit = settings.images if generator else config.train.fid_images
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
        known = read_statistics(path, extractor.protocol, extractor.digest)
        assert known is not None
        return known.pool
    processes = jax.process_count()
    images = with_progress(
        task.real_images(mesh, extractor.rows, limit),
        f"reference of {task.fid_name}:",
        limit or None,
        lambda batch: len(batch) * processes,
    )
    moments = image_moments(images, extractor, shares=True)
    found = Summary(moments.count, moments.gaussian())
    if jax.process_index() == 0:
        write_statistics(path, found, extractor.protocol, extractor.digest)
    log_info(f"the reference of {task.fid_name} is {found.count} images of config.data")
    return found.pool


def image_moments(batches: Images, extractor: Extractor, *, shares: bool = False) -> Moments:
    """Returns the moments of the features of images, the same on every process.

    `batches` are the same on every process or, with `shares`, the process's own rows of every
    batch.
    """
    moments = Moments(extractor.size)
    for features in extractor.stream(batches, shares=shares):
        moments.add(features["pool"])
    return moments


def data_pass(
    config_data: Any, rows: int, *, split: str, images: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """Yields this process's share of a split of `config.data`, at most `rows` per batch.

    images: the number at most, evenly spread over the split; 0: all.
    """
    batches = read_share(config_data, split, limit=images, rows=rows)
    try:
        yield from batches
    finally:
        batches.close()
