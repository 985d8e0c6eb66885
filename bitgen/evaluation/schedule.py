"""FID of few images, for a training loop to call on a schedule."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8

from bitgen.evaluation.features import Extractor
from bitgen.evaluation.frechet import frechet_distance
from bitgen.evaluation.images import pixels, read_data
from bitgen.evaluation.statistics import Gaussian, Moments, merge_over_hosts


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
    index, count = jax.process_index(), jax.process_count()
    batches = read_data(
        config_data,
        split,
        limit=images,
        batch=extractor.rows * count,
        process_index=index,
        process_count=count,
    )
    try:
        return _moments(pixels(batches), extractor).gaussian()
    finally:
        batches.close()


def _moments(batches: Iterable[np.ndarray], extractor: Extractor) -> Moments:
    """Of the images of all processes."""
    moments = Moments(extractor.size)
    for images in batches:
        moments.add(extractor(images)["pool"])
    return merge_over_hosts(moments)
