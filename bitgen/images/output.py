"""Output of images: a PNG file, a grid, a folder of PNG files, or an npz file in ADM's format.

All files appear complete or not at all.
"""

import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from jaxtyping import Int, UInt8
from numpy.lib import format as npy
from PIL import Image

from bitgen.errors import UserError
from bitgen.files import atomic_path, write_json
from bitgen.images.grids import captioned_grid, grid

_CHUNK = 512  # images in one file of an unfinished npz, whatever the batch size
_GRID_LIMIT = 10_000


def write_png(path: str | os.PathLike, image: UInt8[np.ndarray, "H W c"]) -> None:
    """Writes uint8 `[H, W, 3]` (or 4 channels, or `[H, W]`) as PNG.

    Raises UserError for another dtype or shape.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 or (image.ndim, *image.shape[2:]) not in ((2,), (3, 3), (3, 4)):
        raise UserError(
            f"{path}: a PNG takes uint8 [H, W, 3], got {image.dtype} {list(image.shape)}"
        )
    with atomic_path(path) as part:
        Image.fromarray(image).save(part, format="PNG")


class Output(Protocol):
    """Takes images in order from `next_index` on."""

    next_index: int

    def add(self, images: UInt8[np.ndarray, "b H W 3"]) -> None:
        """Takes the next images."""
        ...

    def finish(self) -> str:
        """Completes the output; returns a line about it."""
        ...


def make_output(
    path: Path,
    labels: Int[np.ndarray, " n"],
    columns: int,
    settings: dict[str, Any],
    captions: Sequence[str] = (),
) -> Output:
    """Returns the output for `path`: NAME.png is a grid, NAME.npz a file, and NAME a folder.

    An npz or a folder resumes an earlier run. `settings` describe what makes the images; UserError
    if the earlier run had other settings. `captions` are for a grid.
    """
    if path.suffix == ".png":
        return _Grid(path, len(labels), columns, captions)
    if captions:
        raise UserError("config.sample.captions is for a grid: set config.sample.output=NAME.png")
    if path.suffix == ".npz":
        return _Npz(path, labels, settings)
    if path.suffix:
        raise UserError(f"config.sample.output={path.name}: write NAME.png, NAME.npz or a folder")
    return _Folder(path, labels, settings)


class _Grid:
    def __init__(self, path: Path, count: int, columns: int, captions: Sequence[str]):
        if count > _GRID_LIMIT:
            raise UserError(
                f"{count} images do not fit a grid; set config.sample.output to NAME.npz or "
                "a folder"
            )
        self.path, self.columns, self.captions = path, columns, captions
        self.images, self.next_index = [], 0

    def add(self, images):
        self.images.append(images)
        self.next_index += len(images)

    def finish(self) -> str:
        images = np.concatenate(self.images)
        if self.captions:
            page = captioned_grid(images, self.captions, self.columns)
        else:
            page = grid(images, self.columns)
        write_png(self.path, page)
        return f"wrote {self.path}: {self.next_index} images, {self.columns} a row"


class _Folder:
    """NAME/000000_0207.png: index and label."""

    def __init__(self, path: Path, labels: np.ndarray, settings: dict[str, Any]):
        self.path, self.labels, self.next_index = path, labels, 0
        _same_settings(path, settings)
        while self.next_index < len(labels) and self._file(self.next_index).exists():
            self.next_index += 1

    def _file(self, index: int) -> Path:
        return self.path / f"{index:06d}_{self.labels[index]:04d}.png"

    def add(self, images):
        for image in images:
            write_png(self._file(self.next_index), image)
            self.next_index += 1

    def finish(self) -> str:
        return f"wrote {self.path}: {self.next_index} PNG files, named by index and label"


class _Npz:
    """`arr_0` images and `arr_1` labels, not compressed; chunks are in NAME.npz.part."""

    def __init__(self, path: Path, labels: np.ndarray, settings: dict[str, Any]):
        self.path, self.labels = path, labels
        self.part = path.with_name(path.name + ".part")
        if path.exists():
            raise UserError(f"{path} already exists: delete it or set another config.sample.output")
        _same_settings(self.part, settings)
        chunk = 0
        while self._chunk(chunk).exists():
            chunk += 1
        self.next_index = min(chunk * _CHUNK, len(labels))
        self.waiting = np.zeros((0,), np.uint8)

    def _chunk(self, chunk: int) -> Path:
        return self.part / f"images-{chunk:05d}.npy"

    def add(self, images):
        waiting = np.concatenate([self.waiting, images]) if len(self.waiting) else images
        self.next_index += len(images)
        first = self.next_index - len(waiting)
        while len(waiting) >= _CHUNK or (len(waiting) and self.next_index == len(self.labels)):
            chunk, waiting = waiting[:_CHUNK], waiting[_CHUNK:]
            with atomic_path(self._chunk(first // _CHUNK)) as part, part.open("wb") as f:
                np.save(f, chunk)
            first += _CHUNK
        self.waiting = waiting

    def finish(self) -> str:
        files = [self._chunk(i) for i in range(-(-len(self.labels) // _CHUNK))]
        shape = (len(self.labels), *np.load(files[0], mmap_mode="r").shape[1:])
        with atomic_path(self.path) as part, zipfile.ZipFile(part, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as f:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(f, header)
                for file in files:
                    f.write(np.load(file).tobytes())
            with archive.open("arr_1.npy", "w") as f:
                npy.write_array(f, self.labels.astype(np.int64))
        shutil.rmtree(self.part)
        return f"wrote {self.path}: arr_0 uint8 {list(shape)}, arr_1 labels"


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Writes the settings to a new folder; raises UserError if the folder has other settings."""
    file = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if file.exists():
        before = json.loads(file.read_text())
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise UserError(
                    f"{folder} was started with {key}={before.get(key)!r}, now "
                    f"{key}={settings.get(key)!r}; delete it or set another config.sample.output"
                )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no samples; set config.sample.output")
    write_json(file, settings)
