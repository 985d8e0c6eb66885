"""Features on disk while a generator is measured, so that a killed run resumes."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bitgen.files import atomic_path
from bitgen.runtime.distributed import is_first, on_first

_CHUNK = 512  # images a file


class FeatureStore:
    """Takes features of `count` images in order from `next_index` on, in files of 512 images.

    Process 0 writes; all processes must make the same calls.
    """

    def __init__(self, path: Path, count: int):
        self.path, self.count = path, count
        self.next_index = min(on_first(self._begin) * _CHUNK, count)
        self._waiting: dict[str, np.ndarray] = {}

    def _begin(self) -> int:
        self.path.mkdir(parents=True, exist_ok=True)
        chunks = 0
        while self._file(chunks).exists():
            chunks += 1
        return chunks

    def _file(self, chunk: int) -> Path:
        return self.path / f"features-{chunk:05d}.npz"

    def add(self, features: dict[str, np.ndarray]) -> None:
        """Takes the next features; complete chunks and the last one are written to disk."""
        if self._waiting:
            features = {k: np.concatenate([self._waiting[k], v]) for k, v in features.items()}
        start = self.next_index // _CHUNK * _CHUNK
        rows = len(features["pool"])
        self.next_index = start + rows
        while rows >= _CHUNK or (rows and self.next_index == self.count):
            if is_first():
                chunk: Any = {name: rows[:_CHUNK] for name, rows in features.items()}
                with atomic_path(self._file(start // _CHUNK)) as part, part.open("wb") as file:
                    np.savez(file, **chunk)
            features = {k: v[_CHUNK:] for k, v in features.items()}
            rows, start = max(rows - _CHUNK, 0), start + _CHUNK
        self._waiting = features if rows else {}

    def read(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields the stored features in order."""
        on_first(lambda: None)  # when the first has written all of it
        for chunk in range(-(-self.count // _CHUNK)):
            with np.load(self._file(chunk)) as arrays:
                yield dict(arrays)

    def remove(self) -> None:
        """Deletes the store, and its parent folder if that is then empty."""
        on_first(self._remove)

    def _remove(self) -> None:
        shutil.rmtree(self.path)
        with contextlib.suppress(OSError):
            self.path.parent.rmdir()
