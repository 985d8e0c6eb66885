"""Sets of images to measure: npz files, folders, and the data of a config.

All give uint8 batches [b, H, W, 3] in order, a few in memory at a time.
"""

import os
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from numpy.lib import format as npy

from bitgen import data
from bitgen.data.batches import LoadExample, split_indices
from bitgen.data.sources import IMAGE_SUFFIXES
from bitgen.errors import UserError
from bitgen.images.decode import BrokenImage, decode

Batches = Iterator[np.ndarray]


def read_images(path: str | Path, batch: int) -> tuple[int, Batches]:
    """Returns the number of images of an npz file (its arr_0) or a folder, and their batches.

    Raises UserError if there are none or, while iterating, for a damaged file.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(
            Path(folder) / name
            for folder, _, names in os.walk(path, followlinks=True)
            for name in names
            if name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES)
        )
        if not files:
            raise UserError(f"{path} has no images ({' '.join(IMAGE_SUFFIXES)})")
        return len(files), _folder_batches(files, batch)
    if not path.is_file():
        raise UserError(f"there are no images {path}: give an npz file with arr_0, or a folder")
    count, shape = _npz_shape(path)
    if len(shape) != 3 or shape[-1] != 3:
        raise UserError(f"{path}: arr_0 is {[count, *shape]}, not images [n, H, W, 3]")
    return count, _npz_batches(path, batch)


def read_data(
    config_data: Any,
    split: str,
    *,
    limit: int,
    batch: int,
    process_index: int = 0,
    process_count: int = 1,
) -> data.Batches:
    """Returns one pass over a split of `config.data`, as `data.make_batches` gives it.

    Centre crop, no flip. limit: the number of examples at most, evenly spread over the split,
    because classes often lie one after another; 0: all.
    """
    c: Any = config_data.copy_and_resolve_references()
    c.split = split
    where = {"process_index": process_index, "process_count": process_count}
    batches = data.make_batches(c, batch_size=batch, seed=0, training=False, **where)
    count = batches.num_examples
    if not 0 < limit < count:
        return batches
    batches.close()
    chosen = split_indices(len(batches.source), split, c.holdout)
    chosen = chosen[np.arange(limit) * count // limit]
    scale = (float(c.crop_scale_min), float(c.crop_scale_max))
    load = LoadExample(batches.source, chosen, False, c.image_size, c.crop, scale, False)
    return data.Batches(load, c, batch_size=batch, seed=0, start=0, **where)


def read_share(config_data: Any, split: str, *, limit: int, rows: int) -> data.Batches:
    """Returns what `read_data` does, with `rows` rows of every batch for this process."""
    index, count = jax.process_index(), jax.process_count()
    where = {"process_index": index, "process_count": count}
    return read_data(config_data, split, limit=limit, batch=rows * count, **where)


def pixels(batches: Iterable[dict[str, np.ndarray]]) -> Batches:
    """Yields the images of batches; raises UserError for packed bits."""
    for batch in batches:
        if "image" not in batch:
            raise UserError(
                "config.data.source=bits holds no images to compare with: set config.data to the "
                "images, or config.evaluate.reference"
            )
        yield batch["image"]


def _folder_batches(files: list[Path], batch: int) -> Batches:
    shape = None
    for start in range(0, len(files), batch):
        images = []
        for file in files[start : start + batch]:
            try:
                images.append(np.asarray(decode(file.read_bytes())))
            except (BrokenImage, OSError) as e:
                raise UserError(f"cannot read {file}: {e}; remove it or replace it") from None
            shape = shape or images[-1].shape
            if images[-1].shape != shape:
                sizes = [f"{s[1]}x{s[0]}" for s in (images[-1].shape, shape)]
                raise UserError(
                    f"{file} is {sizes[0]} and the images before are {sizes[1]}: bring them to one "
                    "size first, or set config.data to read them with a centre crop"
                )
        yield np.stack(images)


def _npz_shape(path: Path) -> tuple[int, tuple[int, ...]]:
    with _open_member(path) as (_, shape):
        return shape[0] if shape else 0, shape[1:]


def _npz_batches(path: Path, batch: int) -> Batches:
    with _open_member(path) as (stream, shape):
        bytes_an_image = int(np.prod(shape[1:]))
        for start in range(0, shape[0], batch):
            rows = min(batch, shape[0] - start)
            content = stream.read(rows * bytes_an_image)
            if len(content) < rows * bytes_an_image:
                raise UserError(f"{path} is truncated: make it again")
            yield np.frombuffer(content, np.uint8).reshape(rows, *shape[1:])


def holds_images(path: str | Path) -> bool:
    """Returns whether an npz file has arr_0."""
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


class _open_member:
    """A context with the stream of arr_0's values, and its shape."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        try:
            self.archive = zipfile.ZipFile(self.path)
            names = self.archive.namelist()
            if "arr_0.npy" not in names:
                raise UserError(f"{self.path} has no images: wanted arr_0, it holds {names}")
            self.stream = self.archive.open("arr_0.npy")
            read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
            shape, fortran, dtype = read[npy.read_magic(self.stream)](self.stream)
        except (zipfile.BadZipFile, ValueError, KeyError) as e:
            raise UserError(f"{self.path} is not an npz file, or it is damaged: {e}") from None
        if dtype != np.uint8 or fortran:
            raise UserError(f"{self.path}: arr_0 is {dtype}, not uint8 images [n, H, W, 3]")
        return self.stream, shape

    def __exit__(self, *_):
        self.stream.close()
        self.archive.close()
