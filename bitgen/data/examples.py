"""One example at a time: which ones a split has, reading, decoding, augmenting, stacking.

An example that cannot be read is replaced in training by the next one that can, so that
batches stay full and hosts stay in step; in evaluation it is left out.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np
from jaxtyping import Int

from bitgen.data.packed import PackedSource
from bitgen.data.sources import Source
from bitgen.errors import UserError, choose
from bitgen.images.decode import CROPS, BrokenImage, center_crop, decode, flip

# So many in a row that cannot be read are no accident.
_MOST_IN_A_ROW = 100


def split_indices(n: int, split: str, holdout: float) -> Int[np.ndarray, " m"]:
    """The examples of a split, rising: 'test' is the share `holdout` of n, 'train' the rest.

    The choice depends on n and `holdout` alone. Raises UserError for an empty split.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"config.data.holdout is a share in [0, 1), got {holdout}")
    # Raw PCG64 output is the same in every version of numpy; `permutation` need not be.
    order = np.argsort(np.random.PCG64(0).random_raw(n), kind="stable")
    test = min(n, max(1, round(n * holdout))) if holdout > 0 else 0
    splits = {"train": order[test:], "test": order[:test], "all": order}
    choose("data split", split, splits)
    if len(splits[split]) == 0:
        raise UserError(f"split {split!r} of {n} examples with holdout={holdout} is empty")
    return np.sort(splits[split])


def crop_share(epoch: int, start: int, end: int) -> float:
    """Returns the share of images with the training crop: 1 to 0 from epoch start to end.

    The same throughout an epoch, and always 1 for a negative start; the rule of
    shallowdream204/BitDance `imagenet_gen/train.py`.
    """
    return 1.0 if start < 0 else float(np.clip((end - epoch) / (end - start), 0, 1))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoadExample(grain.transforms.RandomMap):
    """Place in the split -> example: the unit of work of a thread, given to worker processes."""

    source: Source
    indices: np.ndarray
    training: bool
    image_size: int
    crop: str
    crop_scale: tuple[float, float]
    flip: bool
    fade: tuple[int, int] = (-1, -1)

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        """-> the example; one that cannot be read has no label in evaluation.

        `element` is the place, plus the number of places times the epoch where a fade needs it.
        `broken` is None, or the name of the example that cannot be read and why. Raises
        UserError if in training nothing that can be read follows it.
        """
        (epoch, place), broken = divmod(int(element), len(self.indices)), ("", "")
        tries = min(_MOST_IN_A_ROW, len(self.indices)) if self.training else 1
        for attempt in range(tries):
            index = int(self.indices[(place + attempt) % len(self.indices)])
            name = f"example {index}"
            try:
                example = self.source[index]
                name, label = example["name"], np.int32(example["label"])
                if "bits" in example:
                    arrays = self._bits(example, rng)
                else:
                    arrays = self._image(example, crop_share(epoch, *self.fade), rng)
                found = {**arrays, "label": label, "index": np.int32(place)}
                return {**found, "broken": broken if attempt else None}
            except (BrokenImage, OSError) as error:
                broken = (name, str(error)) if attempt == 0 else broken
        if self.training:
            raise UserError(
                f"{tries} images in a row in {self.source.where} cannot be read, "
                f"first: {broken[0]} ({broken[1]}); fix them"
            )
        return {"broken": broken}

    def _image(
        self, example: dict[str, Any], share: float, rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        image = decode(example["image"])
        if not self.training:
            return {"image": center_crop(image, self.image_size)}
        crop = self.crop if share == 1 or rng.random() < share else "center"
        pixels = CROPS[crop](image, self.image_size, rng, *self.crop_scale)
        return {"image": flip(pixels) if self.flip and rng.random() < 0.5 else pixels}

    def _bits(self, example: dict[str, Any], rng: np.random.Generator) -> dict[str, np.ndarray]:
        views = example["bits"]
        return {"bits": views[rng.integers(len(views)) if self.training and self.flip else 0]}

    def empty(self) -> dict[str, np.ndarray]:
        """A batch of no examples."""
        size = self.image_size
        if isinstance(self.source, PackedSource):
            arrays = {"bits": np.zeros((0, *self.source[0]["bits"].shape[1:]), np.uint8)}
        else:
            arrays = {"image": np.zeros((0, size, size, 3), np.uint8)}
        index = {} if self.training else {"index": np.zeros(0, np.int32)}
        return {**arrays, "label": np.zeros(0, np.int32), **index}


def collate(examples: Sequence[dict[str, Any]], empty: dict[str, np.ndarray]) -> dict[str, Any]:
    """Examples -> batch with the keys of `empty`; those that cannot be read are only listed."""
    whole = [example for example in examples if "label" in example]
    batch: dict[str, Any] = {
        key: np.stack([example[key] for example in whole]) if whole else none
        for key, none in empty.items()
    }
    broken = [example["broken"] for example in examples if example["broken"]]
    return {**batch, "rows": len(examples), "broken": broken}
