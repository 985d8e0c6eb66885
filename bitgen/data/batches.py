"""Batches of a source: split, order, augmentation, and the position to resume from.

Every random choice depends only on the seed and on the example's position in the global order of
training, not on threads, worker processes or the number of hosts. That position, one number, is the
state of the iterator.
"""

import atexit
import dataclasses
import functools
import gc
import logging
import re
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np
from absl import flags
from jaxtyping import Int
from ml_collections import ConfigDict

from bitgen.data.packed import PackedSource
from bitgen.data.sources import Source, make_source
from bitgen.errors import UserError, choose
from bitgen.images.decode import CROPS, BrokenImage, center_crop, decode, flip

# Number of examples from which on the share of broken ones counts.
_ENOUGH = 100
# Training stops at so many broken examples in a row.
_MOST_IN_A_ROW = 100


def make_batches(
    config_data: ConfigDict,
    *,
    batch_size: int,
    seed: int,
    training: bool,
    process_index: int = 0,
    process_count: int = 1,
    start: int = 0,
) -> "Batches":
    """Returns the batches of a split; `bitgen.data.default_config` explains `config_data`.

    They are dicts of `image` uint8 [b, H, W, 3], or `bits` uint8 [b, h, w, ceil(k/8)] from packed
    bits, and `label` int32 [b]. `batch_size` counts the rows of all processes.

    With `training` they are endless, each epoch in another order, augmented, and always full.
    Otherwise they are one pass in order from example `start` on, with a centre crop and without
    flips, and have `index` int32 [b], the position in the split. The last batch may be smaller,
    even empty on a later process, and images that cannot be read are left out.

    Images that cannot be read are counted and named in warnings. If their share exceeds
    `max_broken_share`, the next batch raises UserError. Wrong settings raise UserError at once.
    """
    c: Any = config_data
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"batch size {batch_size} cannot be divided among {process_count} processes; "
            "take a multiple"
        )
    if not 0 <= process_index < process_count:
        raise UserError(f"there is no process {process_index} of {process_count}")
    if not 0 <= seed < 2**32:
        raise UserError(f"the data seed must be in [0, 2**32), got {seed}")
    choose("crop", c.crop, CROPS)
    if not 0 < c.crop_scale_min <= c.crop_scale_max <= 1:
        raise UserError(
            "config.data needs 0 < crop_scale_min <= crop_scale_max <= 1, got "
            f"{c.crop_scale_min} and {c.crop_scale_max}"
        )
    fade = (int(c.crop_fade_start), int(c.crop_fade_end))
    if not 0 <= fade[0] < fade[1] and fade != (-1, -1):
        raise UserError(
            "config.data needs 0 <= crop_fade_start < crop_fade_end, epochs, or -1 for both, got "
            f"{fade[0]} and {fade[1]}"
        )
    for key, least in {"image_size": 1, "threads": 1, "workers": 0, "prefetch": 1}.items():
        if c[key] < least:
            raise UserError(f"config.data.{key} must be at least {least}, got {c[key]}")
    source = make_source(c)
    indices = split_indices(len(source), c.split, c.holdout)
    if not 0 <= start <= len(indices):
        raise UserError(f"start={start} is outside of the {len(indices)} examples")
    scale = (float(c.crop_scale_min), float(c.crop_scale_max))
    size, crop, mirror = int(c.image_size), c.crop, bool(c.flip)
    load = LoadExample(source, indices, training, size, crop, scale, mirror, fade)
    return Batches(
        load,
        c,
        batch_size=batch_size,
        seed=int(seed),
        process_index=process_index,
        process_count=process_count,
        start=start,
    )


# -------------------------------------------------------------------------------- examples
def split_indices(n: int, split: str, holdout: float) -> Int[np.ndarray, " m"]:
    """Returns the sorted indices of a split: 'test' is the share `holdout` of n, 'train' the rest.

    The choice depends only on n and `holdout`. Raises UserError for an empty split.
    """
    if not 0 <= holdout < 1:
        raise UserError(f"config.data.holdout must be in [0, 1), got {holdout}")
    # Raw PCG64 output is the same in every version of numpy; `permutation` need not be.
    order = np.argsort(np.random.PCG64(0).random_raw(n), kind="stable")
    test = min(n, max(1, round(n * holdout))) if holdout > 0 else 0
    splits = {"train": order[test:], "test": order[:test], "all": order}
    choose("data split", split, splits)
    if len(splits[split]) == 0:
        raise UserError(f"split {split!r} of {n} examples with holdout={holdout} is empty")
    return np.sort(splits[split])


def crop_share(epoch: int, start: int, end: int) -> float:
    """Returns the share of images with the training crop, falling from 1 to 0 between two epochs.

    It is constant during an epoch, and 1 for a negative start; the rule of shallowdream204/BitDance
    `imagenet_gen/train.py`.
    """
    return 1.0 if start < 0 else float(np.clip((end - epoch) / (end - start), 0, 1))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class LoadExample(grain.transforms.RandomMap):
    """Loads the example at a position of the split: the work of a thread or worker process."""

    source: Source
    indices: np.ndarray
    training: bool
    image_size: int
    crop: str
    crop_scale: tuple[float, float]
    flip: bool
    fade: tuple[int, int] = (-1, -1)

    def random_map(self, element: int, rng: np.random.Generator) -> dict[str, Any]:
        """Returns the example; in evaluation, one that cannot be read has no label.

        `element` is the position plus the epoch times their number. `broken` is None, or the name
        of an example that cannot be read and the reason. In training, the next readable example
        takes its place; raises UserError if there is none.
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
        """Returns a batch of no examples."""
        size = self.image_size
        if isinstance(self.source, PackedSource):
            arrays = {"bits": np.zeros((0, *self.source[0]["bits"].shape[1:]), np.uint8)}
        else:
            arrays = {"image": np.zeros((0, size, size, 3), np.uint8)}
        index = {} if self.training else {"index": np.zeros(0, np.int32)}
        return {**arrays, "label": np.zeros(0, np.int32), **index}


def collate(examples: Sequence[dict[str, Any]], empty: dict[str, np.ndarray]) -> dict[str, Any]:
    """Returns a batch with the keys of `empty`; examples that cannot be read are only listed."""
    whole = [example for example in examples if "label" in example]
    batch: dict[str, Any] = {
        key: np.stack([example[key] for example in whole]) if whole else none
        for key, none in empty.items()
    }
    broken = [example["broken"] for example in examples if example["broken"]]
    return {**batch, "rows": len(examples), "broken": broken}


# -------------------------------------------------------------------------------- batches
class _Rows(grain.MapDataset):
    """The rows of one process: the global order from `start` on, cut into batches."""

    def __init__(self, parent: grain.MapDataset, start: int, batch: int, first: int, rows: int):
        super().__init__(parent)
        self._start, self._batch, self._first, self._rows = start, batch, first, rows
        full, rest = divmod(len(parent) - start, batch)
        # An endless dataset has length sys.maxsize, at which grain's arithmetic overflows.
        self._length = min(full * rows + min(max(rest - first, 0), rows), 2**48)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, row = divmod(index, self._rows)
        return self._parent[self._start + batch * self._batch + self._first + row]


def _with_epoch(count: int, index: int, place: int) -> int:
    return index // count * count + place


def _join(parts: Sequence[list], stack: Callable[[list], dict[str, Any]]) -> dict[str, Any]:
    return stack([example for part in parts for example in part])


def _own(batch: dict[str, Any]) -> dict[str, Any]:
    """Copies arrays out of the memory shared with a worker process, which may end first."""
    return {
        key: np.array(value) if isinstance(value, np.ndarray) else value
        for key, value in batch.items()
    }


def _close(batches: "weakref.ref[Batches]") -> None:
    alive = batches()
    if alive is not None:
        alive.close()


class Batches(grain.DatasetIterator):
    """Iterator of batches, dicts of numpy arrays; made by `make_batches`, and resumed exactly.

    It is a grain iterator, so grain's Orbax checkpoint handlers accept it. Its state is the
    position of the first example that was not yet returned. It is the same on every process, and
    can be resumed with other threads, workers, processes or batch size.
    """

    def __init__(
        self,
        load: LoadExample,
        config_data: Any,
        *,
        batch_size: int,
        seed: int,
        process_index: int,
        process_count: int,
        start: int,
    ):
        super().__init__()
        self.source = load.source
        self.num_examples = len(load.indices)
        self.num_classes = load.source.num_classes
        self.class_names = list(load.source.class_names)
        self._load, self._batch_size, self._seed = load, batch_size, seed
        self._process_index, self._rows = process_index, batch_size // process_count
        self._threads, self._workers = int(config_data.threads), int(config_data.workers)
        self._prefetch = int(config_data.prefetch)
        self._max_broken_share = float(config_data.max_broken_share)
        # A process of many sees only its part of a small data set.
        self._enough = min(_ENOUGH, max(1, self.num_examples // process_count))
        self._next = start
        self._iterator: grain.DatasetIterator | None = None
        self._seen, self._broken = 0, 0
        self._died_at = -1
        self._named: dict[str, str] = {}
        # Worker processes must end before the interpreter destroys their queues.
        self._at_exit = functools.partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._load.training and self._next >= self.num_examples:
            self._seek(self._next)
            raise StopIteration
        batch = self._made()
        if batch is None:  # the last batch ended before the rows of this process
            batch = collate([], self._load.empty())
        self._next += self._batch_size
        self._count(batch.pop("rows"), batch.pop("broken"))
        return batch

    def _made(self) -> dict[str, Any] | None:
        """Returns the next batch of the pipeline, which is restarted if one of its workers dies."""
        while True:
            try:
                return next(self._pipeline(), None)
            except RuntimeError as error:
                if "terminated unexpectedly" not in str(error):
                    raise
                found = re.search(r"exit code (-?\d+)", str(error))
                code = found[1] if found else "unknown"
                why = "killed, as for lack of memory" if code == "-9" else f"exit code {code}"
                if self._died_at == self._next:
                    raise UserError(
                        f"a data worker process died twice at example {self._next} ({why}); lower "
                        "config.data.workers or prefetch, or set workers=0 to see its own error"
                    ) from None
                self._died_at = self._next
                logging.warning("a data worker process died (%s): started again", why)
                self._seek(self._next)

    def _pipeline(self) -> grain.DatasetIterator:
        """Returns the running grain pipeline; starts it at the next example if there is none."""
        if self._closed:
            raise ValueError("these batches are closed")
        if self._iterator is not None:
            return self._iterator
        order = grain.MapDataset.range(self.num_examples).seed(self._seed)
        if self._load.training:
            order = order.shuffle().repeat()
        if self._load.training and self._load.fade[0] >= 0:
            order = order.map_with_index(functools.partial(_with_epoch, self.num_examples))
        examples = order.random_map(self._load)
        first = self._process_index * self._rows
        rows = _Rows(examples, self._next, self._batch_size, first, self._rows)
        stack = functools.partial(collate, empty=self._load.empty())
        if self._workers:
            # Workers get whole batches, so that their number changes nothing.
            batches = rows.batch(self._rows, batch_fn=stack).to_iter_dataset(
                grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            )
            options = grain.MultiprocessingOptions(self._workers, self._prefetch)
            if not flags.FLAGS.is_parsed():  # a notebook or a test; grain reads its own flags
                flags.FLAGS.mark_as_parsed()
            batches = batches.mp_prefetch(options).map(_own)
        else:
            # A thread takes a few examples at a time: with single ones, small images and bits are
            # ten times slower, because the threads wait for each other between examples.
            few = max(size for size in range(1, 9) if self._rows % size == 0)
            ahead = max(self._threads, self._prefetch * self._rows // few)
            options = grain.ReadOptions(num_threads=self._threads, prefetch_buffer_size=ahead)
            parts = rows.batch(few, batch_fn=list).to_iter_dataset(options)
            batches = parts.batch(self._rows // few, batch_fn=functools.partial(_join, stack=stack))
        # Stacking or copying a large batch takes time, so it runs beside the step.
        self._iterator = iter(
            grain.experimental.ThreadPrefetchIterDataset(
                batches, prefetch_buffer_size=self._prefetch
            )
        )
        return self._iterator

    def _count(self, rows: int, broken: Sequence[tuple[str, str]]) -> None:
        """Counts and names images that cannot be read; raises UserError if there are too many."""
        self._seen += rows
        self._broken += len(broken)
        for name, reason in broken:
            if name not in self._named:
                logging.warning("cannot read %s (%s), it is left out", name, reason)
                self._named[name] = reason
        share = self._broken / max(1, self._seen)
        if self._seen >= self._enough and share > self._max_broken_share:
            name, reason = next(iter(self._named.items()))
            raise UserError(
                f"{self._broken} of {self._seen} images in {self.source.where} cannot be read "
                f"({100 * share:.3g}% > {100 * self._max_broken_share:.3g}%), first: {name} "
                f"({reason}); fix them or raise config.data.max_broken_share"
            )

    def counts(self) -> dict[str, int]:
        """Returns how many examples this process has seen since it started, and how many were
        broken.
        """
        return {"seen": self._seen, "broken": self._broken}

    def get_state(self) -> dict[str, int]:
        """Returns the position after the last batch returned, as plain JSON."""
        return {
            "next_example": self._next,
            "seed": self._seed,
            "num_examples": self.num_examples,
        }

    def set_state(self, state: dict[str, int]) -> None:
        """Moves to a position of `get_state`; raises UserError for other data or another seed."""
        for key, value in self.get_state().items():
            if key != "next_example" and state.get(key) != value:
                raise UserError(
                    f"the data iterator was saved with {key}={state.get(key)}, now {value}; "
                    "resume with the same data and seed, or in a new folder"
                )
        self._seek(int(state["next_example"]))

    def _seek(self, place: int) -> None:
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None
            if self._workers:
                gc.collect()  # the pipeline's cycles hold memory shared with its workers
        self._next = place

    def start_prefetch(self) -> None:
        """Begins to prepare batches before the first is asked for."""
        self._pipeline().start_prefetch()

    def close(self) -> None:
        """Ends threads and worker processes; no batches follow."""
        if self._closed:
            return
        atexit.unregister(self._at_exit)
        self._seek(self._next)
        super().close()
