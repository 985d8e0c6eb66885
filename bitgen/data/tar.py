"""ImageNet's `ILSVRC2012_img_train.tar`, a tar of one tar per class, read in place.

The headers are read once and give an index of (offset, size, label, name), kept in an
`.npz` beside the tar, or in the user's cache folder if that place is read-only.
"""

import hashlib
import logging
import os
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from bitgen.errors import UserError
from bitgen.files import atomic_path

_INDEX_VERSION = 1


class TarSource:
    """Images of a tar of tars: class `n01440764` is the inner tar `n01440764.tar`.

    Classes are sorted by name. Raises UserError if the file is missing, damaged, or laid out in
    another way.
    """

    def __init__(self, path: str):
        if not path or not Path(path).is_file():
            raise UserError(
                f"tar {path!r} does not exist; set config.data.path to "
                "ILSVRC2012_img_train.tar or a tar laid out like it"
            )
        index = load_index(path)
        self._offsets, self._sizes = index["offsets"], index["sizes"]
        self._labels, self._names = index["labels"], index["names"]
        self.class_names = [str(name) for name in index["class_names"]]
        self.num_classes = len(self.class_names)
        self.where = path
        self._file = os.open(path, os.O_RDONLY)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key != "_file"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._file = os.open(self.where, os.O_RDONLY)

    def __del__(self):
        if "_file" in self.__dict__:
            os.close(self._file)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        # pread moves no file position, so threads and forked processes can share the file.
        data = os.pread(self._file, int(self._sizes[index]), int(self._offsets[index]))
        label = int(self._labels[index])
        name = f"{self.where}:{self.class_names[label]}.tar:{self._names[index].decode()}"
        return {"image": data, "label": label, "name": name}


def load_index(path: str) -> dict[str, np.ndarray]:
    """Returns the index of a tar of tars, from its cache if that is up to date, else from the tar.

    Arrays over examples: `offsets` int64, `sizes` int64, `labels` int32, `names` bytes; and
    `class_names`. Raises UserError.
    """
    status = os.stat(path)
    stamp = np.asarray([_INDEX_VERSION, status.st_size, status.st_mtime_ns], np.int64)
    places = _cache_places(path)
    for place in places:
        try:
            with open(place, "rb") as file, np.load(file, allow_pickle=False) as stored:
                if np.array_equal(stored["stamp"], stamp):
                    return {key: stored[key] for key in stored.files if key != "stamp"}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            continue  # no such cache, or a damaged one: it is made again
    index = _read_index(path)
    if not any(_save_index(place, index | {"stamp": stamp}) for place in places):
        logging.warning("the index of %s cannot be stored and is read at every start", path)
    return index


def _cache_places(path: str) -> list[Path]:
    absolute = os.path.abspath(path)
    key = hashlib.sha256(absolute.encode()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return [Path(absolute + ".index.npz"), cache / "bitgen" / f"tar-{key}.index.npz"]


def _save_index(place: Path, index: dict[str, np.ndarray]) -> bool:
    try:
        with atomic_path(place) as part, part.open("wb") as file:
            np.savez(file, allow_pickle=False, **index)
    except OSError:
        return False
    return True


class _Window:
    """Unbuffered reads of a part of a file, which skip the images between headers."""

    def __init__(self, file: int, start: int, size: int):
        self._file, self._start, self._size, self._at = file, start, size, 0

    def seek(self, offset: int) -> int:
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def read(self, size: int) -> bytes:
        size = min(size, self._size - self._at)
        data = os.pread(self._file, max(size, 0), self._start + self._at)
        self._at += len(data)
        return data


def _members(file: int, start: int, size: int) -> list[tuple[str, int, int]]:
    """Returns (name, absolute offset of the data, size) of each regular file of a tar."""
    window: Any = _Window(file, start, size)
    with tarfile.open(fileobj=window, mode="r:") as tar:
        found = [(m.name, start + m.offset_data, m.size) for m in tar if m.isreg()]
    if found and max(offset + length for _, offset, length in found) > start + size:
        raise tarfile.ReadError("unexpected end of data")
    return found


def _read_index(path: str) -> dict[str, np.ndarray]:
    logging.info("reading the headers of %s, once", path)
    file = os.open(path, os.O_RDONLY)
    try:
        outer = _members(file, 0, os.fstat(file).st_size)
        classes = sorted(member for member in outer if member[0].endswith(".tar"))
        if not classes:
            raise UserError(
                f"{path} holds no inner tars; wanted one tar per class, as in "
                "ILSVRC2012_img_train.tar (for plain folders use source='folder')"
            )
        offsets, sizes, labels, names = [], [], [], []
        for label, (class_file, start, size) in enumerate(classes):
            images = _members(file, start, size)
            if not images:
                raise UserError(f"{path}: inner tar {class_file} holds no images")
            for name, offset, length in images:
                offsets.append(offset)
                sizes.append(length)
                labels.append(label)
                names.append(name.encode())
    except tarfile.TarError as error:
        raise UserError(
            f"{path} is not a tar file, or it is damaged ({error}); copy it again, uncompressed"
        ) from error
    finally:
        os.close(file)
    return {
        "offsets": np.asarray(offsets, np.int64),
        "sizes": np.asarray(sizes, np.int64),
        "labels": np.asarray(labels, np.int32),
        "names": np.asarray(names, np.bytes_),
        "class_names": np.asarray([Path(name).stem for name, _, _ in classes]),
    }
