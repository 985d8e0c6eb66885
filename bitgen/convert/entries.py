"""The parts of a conversion table: entries, layout transforms and name templates.

Names and paths are templates: `{x}` stands for a run of characters without a separator (`.` in
PyTorch's names, `/` in our paths), `{x*}` for any run, including separators.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Transform:
    """A numpy function from PyTorch's layout to ours and its exact inverse, bit for bit.

    Both raise ValueError for an array of the wrong rank or size.
    """

    forward: Callable[[np.ndarray], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]


def permute(*axes: int) -> Transform:
    """Returns the transform that reorders the axes as `np.transpose` does."""
    inverse = tuple(int(i) for i in np.argsort(axes))
    return Transform(lambda x: np.transpose(x, axes), lambda x: np.transpose(x, inverse))


def squeeze(*axes: int) -> Transform:
    """Returns the transform that drops axes of length one."""
    return Transform(lambda x: np.squeeze(x, axes), lambda x: np.expand_dims(x, axes))


SAME = Transform(lambda x: x, lambda x: x)
LINEAR = permute(1, 0)  # [out, in] -> [in, out]
CONV = permute(2, 3, 1, 0)  # OIHW -> HWIO
POINTWISE = Transform(  # a 1x1 convolution [out, in, 1, 1] -> the kernel of a Dense [in, out]
    lambda x: np.squeeze(x, (2, 3)).T, lambda x: np.expand_dims(x.T, (2, 3))
)


@dataclass(frozen=True)
class Rule:
    """Maps one tensor to one of our leaves or, with `stack`, to one slice of its leading axis.

    `stack` is the placeholder in `torch` that counts the slices; every other one is also in `ours`.
    `slices` are its values, where they are not 0, 1, 2, ...
    """

    torch: str
    ours: str
    transform: Transform = SAME
    stack: str | None = None
    slices: tuple[str, ...] = ()

    def __post_init__(self):
        """Raises ValueError if one side has a placeholder that the other cannot fill."""
        stack = {self.stack} if self.stack else set()
        names, ours = placeholders(self.torch), placeholders(self.ours)
        if names - stack != ours or not stack <= names:
            raise ValueError(f"placeholders of {self.torch!r} and {self.ours!r} do not agree")


@dataclass(frozen=True)
class Alias:
    """A second name of the tensor `of`: compared on import, written again on export."""

    torch: str
    of: str


@dataclass(frozen=True)
class Constant:
    """A tensor that `make(hparams)` computes: not read on import, written on export."""

    torch: str
    make: Callable[[Mapping[str, Any]], np.ndarray]
    shape: Shape | None = None


@dataclass(frozen=True)
class Carry:
    """A tensor that the original's loader demands and our model does not use, kept beside it.

    A name without placeholders must be in the file. If the model was not imported, the export
    writes zeros of `shape` and of the type `zeros`, if it is given.
    """

    torch: str
    reason: str
    shape: Shape | None = None
    zeros: Any = None


@dataclass(frozen=True)
class Ignore:
    """Tensors that are dropped on import and not written on export."""

    torch: str
    reason: str


Entry = Rule | Alias | Constant | Carry | Ignore
Table = Sequence[Entry]


def weights(
    torch: str, ours: str, transform: Transform = SAME, kernel: str = "kernel", **stacked: Any
) -> list[Entry]:
    """Returns the rules of a layer's weight, our leaf `kernel`, and of its bias."""
    return [
        Rule(f"{torch}.weight", f"{ours}/{kernel}", transform, **stacked),
        Rule(f"{torch}.bias", f"{ours}/bias", **stacked),
    ]


def dense(torch: str, ours: str) -> list[Entry]:
    """Returns the rules of a linear layer with a bias."""
    return weights(torch, ours, LINEAR)


def conv(torch: str, ours: str) -> list[Entry]:
    """Returns the rules of a convolution with a bias."""
    return weights(torch, ours, CONV)


def norm(torch: str, ours: str) -> list[Entry]:
    """Returns the rules of a norm with a scale and a bias."""
    return weights(torch, ours, kernel="scale")


def batch_counter(torch: str) -> Carry:
    """Returns the entry of PyTorch's int64 counter in a batch norm."""
    reason = "number of batches that batch normalisation has seen, used by no computation"
    return Carry(f"{torch}.num_batches_tracked", reason, (), np.int64)


def attention_kernels(width: int, heads: int) -> tuple[Transform, Transform]:
    """Returns the transforms of the query-key-value matrix and of the output matrix."""
    split = (heads, width // heads)
    qkv = Transform(  # [3 d, d] -> [d, 3, heads, head_dim]
        lambda x: x.reshape(3, *split, width).transpose(3, 0, 1, 2),
        lambda x: x.transpose(1, 2, 3, 0).reshape(3 * width, width),
    )
    out = Transform(  # [d, d] -> [heads, head_dim, d]
        lambda x: x.T.reshape(*split, width),
        lambda x: x.reshape(width, width).T,
    )
    return qkv, out


def transformer_layers(
    width: int, heads: int, mlp: Mapping[str, tuple[str, Transform]]
) -> list[Entry]:
    """Returns the rules of a transformer's tensors, each stacked over the layers.

    `mlp` maps the names of the feed-forward weights to ours and their transforms.
    """
    qkv, out = attention_kernels(width, heads)
    tensors = {
        "attention.wqkv": ("attention/qkv/kernel", qkv),
        "attention.wo": ("attention/out/kernel", out),
        "attention_norm": ("attention_norm/scale", SAME),
        "ffn_norm": ("mlp_norm/scale", SAME),
    }
    for name, (ours, transform) in mlp.items():
        tensors[f"feed_forward.{name}"] = (f"mlp/{ours}/kernel", transform)
    return [
        Rule(f"layers.{{layer}}.{name}.weight", f"layers/{ours}", transform, stack="layer")
        for name, (ours, transform) in tensors.items()
    ]


_FIELD = re.compile(r"\{(\w+)(\*?)\}")


def placeholders(template: str) -> set[str]:
    """Returns the names of the placeholders."""
    return {found[1] for found in _FIELD.finditer(template)}


def render(template: str, values: Mapping[str, str]) -> str:
    """Returns the template with each placeholder replaced by its value."""
    return _FIELD.sub(lambda found: values[found[1]], template)


@functools.cache
def _pattern(template: str, separator: str) -> re.Pattern:
    pattern, end = "", 0
    for found in _FIELD.finditer(template):
        run = ".+" if found[2] else f"[^{separator}]+"
        pattern += re.escape(template[end : found.start()]) + f"(?P<{found[1]}>{run})"
        end = found.end()
    return re.compile(pattern + re.escape(template[end:]))


class Matcher:
    """Finds the entries of some kinds whose template `torch`, `of` or `ours` matches a name."""

    def __init__(self, table: Table, kinds: Any, side: str):
        self.exact, self.patterns = defaultdict(list), []
        separator = "/" if side == "ours" else "."
        for entry in table:
            if not isinstance(entry, kinds):
                continue
            template = getattr(entry, side)
            if placeholders(template):
                self.patterns.append((entry, _pattern(template, separator)))
            else:  # looked up, because a table may name hundreds
                self.exact[template].append(entry)

    def __call__(self, name: str) -> list[tuple[Any, dict[str, str]]]:
        """Returns (entry, placeholder values) of all entries that match."""
        found = [(entry, {}) for entry in self.exact.get(name, ())]
        tried = ((entry, pattern.fullmatch(name)) for entry, pattern in self.patterns)
        return found + [(entry, match.groupdict()) for entry, match in tried if match]


def renamed(reference: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Returns an original's hyper-parameters by our names, with tuples in place of lists.

    `names` maps theirs to ours; what is missing in it, or None, is left out.
    """
    found = {ours: reference.get(theirs) for theirs, ours in names.items()}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in found.items()
        if value is not None
    }


def shape_votes(
    shapes: Mapping[str, Shape], pattern: str, axis: int, default: int | None = None
) -> int | None:
    """Returns the most common size of an axis among the tensors whose names match, or `default`.

    A size that several tensors share is found even if one of them is missing or misshaped, so that
    the import can name the fault.
    """
    matched = (shape for name, shape in shapes.items() if re.fullmatch(pattern, name))
    votes = Counter(int(shape[axis]) for shape in matched if axis < len(shape))
    return votes.most_common(1)[0][0] if votes else default


def count_numbered(shapes: Mapping[str, Shape], pattern: str) -> int:
    """Returns one more than the largest number that the pattern finds in a name, or 0."""
    found = (re.fullmatch(pattern, name) for name in shapes)
    return max((int(match[1]) + 1 for match in found if match), default=0)
