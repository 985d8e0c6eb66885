"""Bits packed into bytes, and folders of shards that hold a dataset of them.

Eight bits make a byte, the first one in the highest place, as in `numpy.packbits` and
`jax.numpy.packbits`; an incomplete last byte is filled with zeros. docs/formats.md describes the
files of a folder. Shard s covers the examples from s * examples_per_shard on of the source; it has
fewer rows if some could not be read.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, UInt8

from bitgen.errors import UserError
from bitgen.files import atomic_path, write_json

FORMAT = 1
_META_KEYS = {
    *("grid", "bits", "views", "num_classes", "class_names", "count"),
    *("examples_per_shard", "tokenizer", "source"),
}


def pack_bits(bits: Bool[Any, "*b k"]) -> UInt8[Any, "*b k8"]:
    """Packs bool `[..., k]` into uint8 `[..., ceil(k/8)]`, for numpy or jax (also under jit)."""
    if isinstance(bits, np.ndarray):
        return np.packbits(bits, axis=-1)
    import jax.numpy as jnp

    return jnp.packbits(bits, axis=-1)


def unpack_bits(packed: UInt8[Any, "*b k8"], k: int) -> Bool[Any, "*b k"]:
    """Unpacks uint8 `[..., ceil(k/8)]` into bool `[..., k]`, for numpy or jax (also under jit).

    Raises UserError if the bytes are not those of k bits.
    """
    if packed.shape[-1] != -(-k // 8):
        raise UserError(
            f"{k} bits are packed in {-(-k // 8)} bytes, got {packed.shape[-1]} "
            f"(array {list(packed.shape)})"
        )
    if isinstance(packed, np.ndarray):
        return np.unpackbits(packed, axis=-1, count=k).astype(bool)
    import jax.numpy as jnp

    return jnp.unpackbits(packed, axis=-1, count=k).astype(bool)


def _shard_paths(directory: Path, shard: int) -> tuple[Path, Path]:
    return directory / f"bits-{shard:05d}.npy", directory / f"labels-{shard:05d}.npy"


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_path(path) as part, part.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())


def _read_json(directory: Path) -> dict[str, Any]:
    path = directory / "bits.json"
    try:
        meta = json.loads(path.read_text())
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); tokenize into a new folder") from error
    if meta.get("format") != FORMAT:
        raise UserError(f"{path} has format {meta.get('format')}, this version reads {FORMAT}")
    lacking = sorted((_META_KEYS | {"examples", "complete"}) - set(meta))
    if lacking:
        raise UserError(f"{path} lacks {lacking}; tokenize into a new folder")
    return meta


class PackedWriter:
    """Writes a folder of packed bits shard by shard; opened again, it resumes.

    `meta` has grid, bits, views, num_classes, class_names, count (examples to tokenize),
    examples_per_shard, tokenizer and source, all JSON. Give `add` the examples from `next_index`
    on, in order, then call `finish`. Raises UserError for a meta that lacks a key, or a folder
    started with another meta. One writer at a time.
    """

    def __init__(self, directory: str | os.PathLike, meta: Mapping[str, Any]):
        if set(meta) != _META_KEYS:
            wrong = sorted(set(meta) ^ _META_KEYS)
            raise UserError(f"the meta of packed bits needs {sorted(_META_KEYS)}; wrong: {wrong}")
        self._directory = Path(directory)
        for key in ("examples_per_shard", "count", "bits", "views", "num_classes"):
            if meta[key] < 1:
                raise UserError(f"packed bits need {key} >= 1, got {meta[key]}")
        # A round trip turns tuples into lists, as JSON has them.
        self.meta: dict[str, Any] = json.loads(json.dumps({"format": FORMAT, **meta}))
        self._per_shard = int(meta["examples_per_shard"])
        self._shards = -(-int(meta["count"]) // self._per_shard)
        height, width = meta["grid"]
        self._row = (int(meta["views"]), height, width, -(-int(meta["bits"]) // 8))
        self._bits: list[np.ndarray] = []
        self._labels: list[np.ndarray] = []
        self._missing = 0
        self.complete = False
        self._open()

    def _open(self) -> None:
        path = self._directory / "bits.json"
        if path.exists():
            stored = _read_json(self._directory)
            self.complete = stored["complete"]
            stored["count"] = stored["examples"]
            for key, value in self.meta.items():
                if stored.get(key) != value:
                    raise UserError(
                        f"{self._directory} was started with {key}={json.dumps(stored.get(key))}, "
                        f"now {key}={json.dumps(value)}; use another folder or delete it"
                    )
        else:
            if self._directory.exists() and any(self._directory.iterdir()):
                raise UserError(
                    f"{self._directory} is not empty and has no bits.json; use another folder"
                )
            self._directory.mkdir(parents=True, exist_ok=True)
            write_json(path, {**self.meta, "examples": self.meta["count"], "complete": False})
        for part in self._directory.glob(".*.part"):  # of a run that was killed
            part.unlink()
        self._shard = 0  # the shard being filled
        # The bits file is written after the labels.
        while self._shard < self._shards and _shard_paths(self._directory, self._shard)[0].exists():
            self._shard += 1
        self._next = min(self._shard * self._per_shard, self.meta["count"])

    @property
    def next_index(self) -> int:
        """The first example that is not yet on disk; `count` if all are."""
        return min(self._shard * self._per_shard, self.meta["count"])

    def add(
        self,
        packed: UInt8[np.ndarray, "b views h w k8"],
        labels: Int[np.ndarray, " b"],
        index: Int[np.ndarray, " b"] | None = None,
    ) -> None:
        """Takes the next examples, and writes each shard that they complete.

        `index` is the ascending position of each in the source; an example that is left out because
        it cannot be read leaves a gap. By default there are no gaps. Raises UserError for other
        shapes, unknown labels, or an index that does not ascend.
        """
        packed, labels = np.asarray(packed), np.asarray(labels)
        if packed.shape[1:] != self._row or packed.dtype != np.uint8:
            raise UserError(
                f"{self._directory} takes uint8 [b, {str(list(self._row))[1:]}, "
                f"got {packed.dtype} {list(packed.shape)}"
            )
        index = self._next + np.arange(len(packed)) if index is None else np.asarray(index)
        if len(labels) != len(packed) or len(index) != len(packed):
            raise UserError(
                f"{len(packed)} packed bits with {len(labels)} labels and {len(index)} indices"
            )
        if len(packed) == 0:
            return
        if index[0] < self._next or np.any(np.diff(index) < 1) or index[-1] >= self.meta["count"]:
            raise UserError(
                f"{self._directory} continues at example {self._next} of {self.meta['count']}, "
                f"in order; got {index[0]} to {index[-1]}"
            )
        if labels.min() < 0 or labels.max() >= self.meta["num_classes"]:
            raise UserError(
                f"labels are {labels.min()} to {labels.max()}, "
                f"{self._directory} has {self.meta['num_classes']} classes"
            )
        self._missing += int(index[-1]) + 1 - self._next - len(index)
        shards = index // self._per_shard
        for shard in np.unique(shards):
            self._write_shards_before(int(shard))
            self._bits.append(packed[shards == shard])
            self._labels.append(labels[shards == shard].astype(np.int32))
        self._next = int(index[-1]) + 1
        self._write_shards_before(self._next // self._per_shard)

    def _write_shards_before(self, shard: int) -> None:
        while self._shard < shard:
            bits = np.concatenate([np.zeros((0, *self._row), np.uint8), *self._bits])
            labels = np.concatenate([np.zeros(0, np.int32), *self._labels])
            bits_path, labels_path = _shard_paths(self._directory, self._shard)
            _save(labels_path, labels)
            _save(bits_path, bits)
            self._bits, self._labels = [], []
            self._shard += 1

    def finish(self, broken: int = 0) -> None:
        """Writes the last shard and marks the folder complete, once all examples were added.

        `broken` is the number of examples that this run left out because they cannot be read.
        Raises UserError if more are missing.
        """
        if self.complete:
            return
        missing = self._missing + self.meta["count"] - self._next
        if missing > broken:
            raise UserError(
                f"{self._directory} cannot be finished: {missing} of {self.meta['count']} "
                f"examples were not added and only {broken} are broken; tokenize all of them"
            )
        self._write_shards_before(self._shards)
        paths = [_shard_paths(self._directory, shard)[1] for shard in range(self._shards)]
        sizes = [len(np.load(path, mmap_mode="r")) for path in paths]
        done = {"examples": self.meta["count"], "count": sum(sizes), "shard_sizes": sizes}
        write_json(self._directory / "bits.json", {**self.meta, **done, "complete": True})
        self.complete = True


class PackedSource:
    """Reads a folder of packed bits; shards are memory-mapped.

    `source[i]` -> {"bits": uint8 [views, h, w, ceil(k/8)], "label": int, "name": str}; `meta` is
    the content of bits.json. Raises UserError if the folder is missing, damaged or not complete.
    """

    def __init__(self, directory: str | os.PathLike):
        folder = Path(directory)
        if not directory or not (folder / "bits.json").is_file():
            raise UserError(
                f"{str(directory)!r} is not a folder of bits (it has no bits.json); set "
                "config.data.path to what --mode=tokenize wrote"
            )
        self.meta = _read_json(folder)
        if not self.meta["complete"]:
            raise UserError(
                f"{folder} is not finished; run --mode=tokenize again with the same settings"
            )
        self.where = str(folder)
        self.class_names: list[str] = self.meta["class_names"]
        self.num_classes: int = self.meta["num_classes"]
        self._starts = np.cumsum([0, *self.meta["shard_sizes"]])
        self._open_shards()

    def _open_shards(self) -> None:
        height, width = self.meta["grid"]
        row = (self.meta["views"], height, width, -(-self.meta["bits"] // 8))
        self._bits: list[np.ndarray] = []
        labels = [np.zeros(0, np.int32)]
        for shard, size in enumerate(self.meta["shard_sizes"]):
            bits_path, labels_path = _shard_paths(Path(self.where), shard)
            try:
                # An empty file cannot be mapped.
                self._bits.append(np.load(bits_path, mmap_mode="r" if size else None))
                labels.append(np.load(labels_path))
            except (OSError, ValueError) as error:
                raise UserError(f"{bits_path} is missing or damaged: {error}") from error
            if self._bits[-1].shape != (size, *row) or len(labels[-1]) != size:
                raise UserError(
                    f"{bits_path} holds {list(self._bits[-1].shape)} with {len(labels[-1])} "
                    f"labels, bits.json says {[size, *row]}; tokenize into a new folder"
                )
        self._labels = np.concatenate(labels)

    def __reduce__(self):
        return PackedSource, (self.where,)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        row = int(index - self._starts[shard])
        name = f"{self.where}/bits-{shard:05d}.npy row {row}"
        bits = np.array(self._bits[shard][row])
        return {"bits": bits, "label": int(self._labels[index]), "name": name}
