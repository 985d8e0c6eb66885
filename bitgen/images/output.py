"""Where sampled images go: a grid, a folder of PNG files, or ADM's npz; all but the grid resume."""

import json
import os
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import Int, UInt8
from numpy.lib import format as npy

from bitgen.errors import UserError
from bitgen.images.files import write_png
from bitgen.images.grids import captioned_grid, grid
from bitgen.runtime.distributed import on_first

_CHUNK = 512  # images a file of an npz under way, whatever the batch size

_GRID_LIMIT = 10_000


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
    """Returns the output that `path` asks for: NAME.png a grid, NAME.npz, or NAME/ a folder.

    `settings` say what makes the images: what is there of other settings is refused by UserError.
    `captions` of the images are for a grid. Of several processes the first writes; all must use the
    output alike.
    """
    if jax.process_count() == 1:
        return _make(path, labels, columns, settings, captions)
    made: list[Output] = []

    def make() -> int:
        made.append(_make(path, labels, columns, settings, captions))
        return made[0].next_index

    next_index = on_first(make)
    return _Shared(made[0] if made else None, next_index)


def _make(
    path: Path,
    labels: np.ndarray,
    columns: int,
    settings: dict[str, Any],
    captions: Sequence[str],
) -> Output:
    if path.suffix == ".png":
        return _Grid(path, len(labels), columns, captions)
    if captions:
        raise UserError("config.sample.captions is for a grid: set config.sample.output=NAME.png")
    if path.suffix == ".npz":
        return _Npz(path, labels, settings)
    if path.suffix:
        raise UserError(f"config.sample.output={path.name}: write NAME.png, NAME.npz or a folder")
    return _Folder(path, labels, settings)


class _Shared:
    """The output of several processes; `output` is None on all but the first."""

    def __init__(self, output: Output | None, next_index: int):
        self.output, self.next_index = output, next_index

    def add(self, images):
        self.next_index += len(images)
        if self.output is not None:
            self.output.add(images)

    def finish(self) -> str:
        return on_first(lambda: self.output.finish() if self.output else "")


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
            write_png(self.path, captioned_grid(images, self.captions, self.columns))
        else:
            write_png(self.path, grid(images, self.columns))
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
    """`arr_0` images and `arr_1` labels, uncompressed, gathered in chunks under NAME.npz.part."""

    def __init__(self, path: Path, labels: np.ndarray, settings: dict[str, Any]):
        self.path, self.labels = path, labels
        self.part = path.with_name(path.name + ".part")
        if path.exists():
            raise UserError(
                f"{path} is there already: delete it or set another config.sample.output"
            )
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
            file = self._chunk(first // _CHUNK)
            temporary = file.with_suffix(".writing")
            with temporary.open("wb") as f:
                np.save(f, chunk)
            os.replace(temporary, file)
            first += _CHUNK
        self.waiting = waiting

    def finish(self) -> str:
        files = [self._chunk(i) for i in range(-(-len(self.labels) // _CHUNK))]
        shape = (len(self.labels), *np.load(files[0], mmap_mode="r").shape[1:])
        temporary = self.part / "whole.npz"
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as f:
                header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(f, header)
                for file in files:
                    f.write(np.load(file).tobytes())
            with archive.open("arr_1.npy", "w") as f:
                npy.write_array(f, self.labels.astype(np.int64))
        os.replace(temporary, self.path)
        shutil.rmtree(self.part)
        return f"wrote {self.path}: arr_0 uint8 {list(shape)}, arr_1 labels"


def _same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Notes the settings in a new folder; raises UserError if the folder has others."""
    file = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if file.exists():
        before = json.loads(file.read_text())
        for key in sorted(before.keys() | settings.keys()):
            if before.get(key) != settings.get(key):
                raise UserError(
                    f"{folder} was begun with {key}={before.get(key)!r}, now "
                    f"{key}={settings.get(key)!r}; delete it or set another config.sample.output"
                )
        return
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty and holds no samples; set config.sample.output")
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=2) + "\n")
