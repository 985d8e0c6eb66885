"""Images listed in a text file, one per line, as in BitVAE's `labels/imagenet/val.txt`."""

import os
import re
from typing import Any

import numpy as np

from bitgen.errors import UserError

_LINE = re.compile(r"(?P<name>\S.*?)(\s+(?P<first>\d+)(\s+(?P<second>\d+))?)?")

_WANTED = "wanted one image a line: PATH, PATH LABEL or PATH HEIGHT WIDTH"


class ListSource:
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
        self._files: list[str] = []
        labels: list[int] = []
        for number, line in enumerate(lines, 1):
            if found := _LINE.fullmatch(line.strip()):
                self._files.append(os.path.join(root, found["name"]))
                if found["first"] and not found["second"]:
                    labels.append(int(found["first"]))
                if not os.path.isfile(self._files[-1]):
                    raise UserError(f"{path} line {number}: there is no file {self._files[-1]}")
                if len(labels) not in (0, len(self._files)):
                    raise UserError(f"{path} line {number}: not all lines have a label; {_WANTED}")
        if not self._files:
            raise UserError(f"image list {path!r} is empty; {_WANTED}")
        self._labels = np.asarray(labels or [0] * len(self._files), np.int32)
        self.num_classes = int(self._labels.max()) + 1
        self.class_names = [str(i) for i in range(self.num_classes)]
        self.where = path

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        name = self._files[index]
        with open(name, "rb") as file:
            data = file.read()
        return {"image": data, "label": int(self._labels[index]), "name": name}
