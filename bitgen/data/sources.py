"""Sources of examples: random access to encoded images (or packed bits) and labels.

A source has `len(source)`, `source[i]` -> {"image": encoded bytes or uint8 [H, W, 3], "label": int,
"name": str} (with "bits" in place of "image" for packed bits), `num_classes`, `class_names` and
`where`, its name in error messages. Sources can be read from several threads, and pickled, which
opens their files again.
"""

import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from bitgen.data.packed import PackedSource
from bitgen.data.tar import TarSource
from bitgen.errors import UserError, choose

_LINE = re.compile(r"(?P<name>\S.*?)(\s+(?P<first>\d+)(\s+(?P<second>\d+))?)?")
_WANTED = "wanted one image a line: PATH, PATH LABEL or PATH HEIGHT WIDTH"
IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Source(Protocol):
    """Random access to examples; see the module's docstring."""

    class_names: Sequence[str]
    where: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @property
    def num_classes(self) -> int: ...


class DigitsSource:
    """scikit-learn's 1,797 handwritten digits (8x8, no download), white on black.

    Enlarged with Lanczos to uint8 `[image_size, image_size, 3]`.
    """

    def __init__(self, image_size: int):
        from sklearn.datasets import load_digits

        digits = load_digits()
        # 0..16 -> 0..255
        self._images = np.round(np.asarray(digits.images) * (255 / 16)).astype(np.uint8)
        self._labels = np.asarray(digits.target).astype(np.int32)
        self._size = (image_size, image_size)
        self.class_names = [str(digit) for digit in range(10)]
        self.num_classes = 10
        self.where = "the digits"

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        small = Image.fromarray(self._images[index])
        image = np.asarray(small.resize(self._size, Image.Resampling.LANCZOS).convert("RGB"))
        return {"image": image, "label": int(self._labels[index]), "name": f"digit {index}"}


class FileSource:
    """Examples whose images are files of their own."""

    def __init__(
        self, files: Sequence[str], labels: Sequence[int], class_names: Sequence[str], where: str
    ):
        self._files, self._labels = files, np.asarray(labels, np.int32)
        self.class_names, self.num_classes, self.where = class_names, len(class_names), where

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._files[index]
        return {"image": Path(name).read_bytes(), "label": int(self._labels[index]), "name": name}


class FolderSource(FileSource):
    """A folder with one sub-folder of images per class; classes are sorted by name.

    Images are found by their suffix (in either case), at any depth below their class; hidden files
    and folders are ignored. Raises UserError if the folder is missing or empty, has no sub-folders,
    or a class has no image.
    """

    def __init__(self, path: str):
        root = Path(path)
        layout = (
            "wanted one sub-folder per class (PATH/cat/1.jpg); set config.data.path, or "
            "config.data.source=list for a text file that names the images"
        )
        if not path or not root.is_dir():
            raise UserError(f"image folder {path!r} does not exist; {layout}")
        classes = sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")
        if not classes:
            what = "has no class sub-folders" if any(root.iterdir()) else "is empty"
            raise UserError(f"image folder {path!r} {what}; {layout}")
        found: list[str] = []
        labels: list[int] = []
        for label, name in enumerate(classes):
            files = _image_files(root / name)
            if not files:
                raise UserError(
                    f"class folder {str(root / name)!r} has no images "
                    f"({' '.join(IMAGE_SUFFIXES)}); add some or remove the folder"
                )
            found += files
            labels += [label] * len(files)
        super().__init__(found, labels, classes, path)


def _image_files(root: Path) -> list[str]:
    """Returns the sorted paths of the images in a folder of a class."""
    found = []
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = [name for name in folders if name[0] != "."]
        found += [
            os.path.join(folder, name)
            for name in files
            if name[0] != "." and name.lower().endswith(IMAGE_SUFFIXES)
        ]
    return sorted(found)


class ListSource(FileSource):
    """The images of a text file in its order, one per line; empty lines are skipped.

    A line is `PATH`, `PATH LABEL` with a number from 0 on, or `PATH HEIGHT WIDTH` without a label
    (FoundationVision/BitVAE). All lines have one form; without labels all images are one class.
    Relative paths start at the folder of the list. Raises UserError with the line for a file that
    is missing, and for a line of another form.
    """

    def __init__(self, path: str):
        if not path or not os.path.isfile(path):
            raise UserError(f"image list {path!r} does not exist; set config.data.path, {_WANTED}")
        try:
            with open(path, encoding="utf-8") as file:
                lines = file.read().splitlines()
        except UnicodeDecodeError:
            raise UserError(f"image list {path!r} is not a text file; {_WANTED}") from None
        root = os.path.dirname(os.path.abspath(path))
        files: list[str] = []
        labels: list[int] = []
        for number, line in enumerate(lines, 1):
            if found := _LINE.fullmatch(line.strip()):
                files.append(os.path.join(root, found["name"]))
                if found["first"] and not found["second"]:
                    labels.append(int(found["first"]))
                if not os.path.isfile(files[-1]):
                    raise UserError(f"{path} line {number}: there is no file {files[-1]}")
                if len(labels) not in (0, len(files)):
                    raise UserError(f"{path} line {number}: not all lines have a label; {_WANTED}")
        if not files:
            raise UserError(f"image list {path!r} is empty; {_WANTED}")
        labels = labels or [0] * len(files)
        class_names = [str(i) for i in range(max(labels) + 1)]
        super().__init__(files, labels, class_names, path)


class NpzSource:
    """An npz file with `image`, uint8 `[n, H, W, 3]`, and optionally `label`, integers `[n]`.

    It is held in memory; without `label` all images are one class. Raises UserError for a file that
    is missing, damaged or holds other arrays.
    """

    def __init__(self, path: str):
        wanted = "wanted an npz file with image, uint8 [n, H, W, 3], and maybe label, integers [n]"
        if not path or not os.path.isfile(path):
            raise UserError(f"npz file {path!r} does not exist; set config.data.path, {wanted}")
        arrays: dict[str, np.ndarray] = {}
        try:
            with open(path, "rb") as file, zipfile.ZipFile(file) as members:
                present = sorted(name.removesuffix(".npy") for name in members.namelist())
            with np.load(path) as archive:
                arrays = {name: archive[name] for name in ("image", "label") if name in archive}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"npz file {path!r} cannot be read ({error}); {wanted}") from error
        if "image" not in arrays:
            raise UserError(f"npz file {path!r} has {present} and no 'image'; {wanted}")
        images = arrays["image"]
        labels = arrays.get("label", np.zeros(len(images) if images.ndim else 0, np.int32))
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3 or not images.size:
            found = f"{images.dtype} {list(images.shape)}"
            raise UserError(f"image in npz file {path!r} is {found}; {wanted}")
        whole = np.issubdtype(labels.dtype, np.integer)
        if not whole or labels.shape != images.shape[:1] or labels.min() < 0:
            found = f"{labels.dtype} {list(labels.shape)}"
            raise UserError(
                f"label in npz file {path!r} is {found} for {len(images)} images, or has negative "
                f"numbers; {wanted}"
            )
        self._images, self._labels = images, labels
        self.num_classes = int(labels.max()) + 1
        self.class_names = [str(i) for i in range(self.num_classes)]
        self.where = path

    def __reduce__(self):
        return NpzSource, (self.where,)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = int(self._labels[index])
        return {"image": self._images[index], "label": label, "name": f"{self.where} {index}"}


class TfdsSource:
    """A TensorFlow Datasets builder, read through its random-access (array_record) files.

    The builder needs an `image` feature; without a `label` feature all images are one class. TFDS
    prepares the data on first use; `data_dir` '' is its default. Raises UserError for an unknown
    builder or split, or one without images.
    """

    def __init__(self, builder: str, split: str, data_dir: str):
        import tensorflow_datasets as tfds

        self._arguments = (builder, split, data_dir)
        self.where = f"tfds {builder}[{split}]"
        if not builder:
            raise UserError("source 'tfds' needs config.data.builder, such as 'mnist'")
        try:
            records: Any = tfds.data_source(
                builder,
                split=split,
                data_dir=data_dir or None,
                decoders={"image": tfds.decode.SkipDecoding()},
            )
        # TFDS raises ValueErrors of many lines, download errors, and assertion errors.
        except Exception as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            folder = data_dir or "its default data_dir"
            raise UserError(f"cannot open {self.where} in {folder}: {reason}") from error
        features = records.dataset_info.features
        if "image" not in features:
            raise UserError(f"{self.where} has no 'image' feature, it has {sorted(features)}")
        self._records = records
        if "label" not in features:
            self.class_names = ["all"]
        elif isinstance(features["label"], tfds.features.ClassLabel):
            self.class_names = list(features["label"].names)
        else:
            raise UserError(f"the labels of {self.where} are not classes: {features['label']}")
        self.num_classes = len(self.class_names)

    def __reduce__(self):
        return TfdsSource, self._arguments

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record: Any = self._records[index]
        label = int(record.get("label", 0))
        return {"image": record["image"], "label": label, "name": f"{self.where} {index}"}


SOURCES = {
    "digits": lambda c: DigitsSource(c.image_size),
    "folder": lambda c: FolderSource(c.path),
    "list": lambda c: ListSource(c.path),
    "tar": lambda c: TarSource(c.path),
    "tfds": lambda c: TfdsSource(c.builder, c.builder_split, c.path),
    "npz": lambda c: NpzSource(c.path),
    "bits": lambda c: PackedSource(c.path),
}


def make_source(config_data: ConfigDict) -> Source:
    """Opens the source that `config_data` names; raises UserError if it cannot."""
    c: Any = config_data
    choose("data source", c.source, SOURCES)
    return SOURCES[c.source](c)
