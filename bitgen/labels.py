"""Class labels as users write them: numbers, ranges and names."""

import collections
import difflib
import functools
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

import numpy as np
from jaxtyping import Int

from bitgen.errors import UserError


def parse_labels(
    text: str, num_classes: int, class_names: Sequence[str] = ()
) -> Int[np.ndarray, " n"]:
    """Returns the labels in '3', '0-9', '207,360-362', 'goldfish,otter' or 'all', in that order.

    A class with several names ('tench, Tinca tinca') is found by any of them. Raises UserError for
    a label out of range and for a name that belongs to no class or to several.
    """
    if text == "all":
        return np.arange(num_classes)
    index = _by_word(tuple(class_names))
    labels: list[int] = []
    for part in (part.strip() for part in str(text).split(",")):
        first, _, last = part.partition("-")
        if first.isdigit() and (last.isdigit() or not last):
            labels += range(int(first), int(last or first) + 1)
        elif len(found := index.get(part.lower(), ())) == 1:
            labels.append(found[0])
        else:
            raise UserError(_unknown(part, found, index))
    if not labels:
        raise UserError(f"no labels in {text!r}: write indices and ranges, 0-9,207")
    if max(labels) >= num_classes:
        raise UserError(
            f"label {max(labels)} is out of range: the model has classes 0 to {num_classes - 1}"
        )
    return np.array(labels)


def class_names_of(info: Mapping[str, Any]) -> list[str]:
    """Returns the class names in a generator's model.json; if it has none, ImageNet's for 1,000."""
    if names := info.get("class_names"):
        return list(names)
    return imagenet_names() if info["hparams"].get("num_classes") == 1000 else []


def imagenet_names() -> list[str]:
    """Returns the names of ImageNet's 1,000 classes in the order of their WordNet numbers."""
    text = resources.files("bitgen.data").joinpath("imagenet_classes.txt").read_text()
    return [line.split("\t")[1] for line in text.splitlines()]


@functools.lru_cache(maxsize=4)
def _by_word(class_names: tuple[str, ...]) -> dict[str, list[int]]:
    """Returns the labels of every name, in lower case."""
    index = collections.defaultdict(list)
    for label, name in enumerate(class_names):
        for word in {name.lower(), *(word.strip().lower() for word in name.split(","))}:
            index[word].append(label)
    return dict(index)


def _unknown(part: str, found: Sequence[int], index: Mapping[str, list[int]]) -> str:
    """Returns the error for a name that belongs to no class, or to several (`found`)."""
    if found:
        return f"{part!r} names classes {', '.join(map(str, found))}: write the number"
    near = difflib.get_close_matches(part.lower(), index, n=3)
    hint = f"; near it: {', '.join(near)}" if near else ""
    return f"cannot read the label {part!r}: write indices, ranges (0-9,207) or class names{hint}"
