"""Inception's weights, from PyTorch's two ports or from TensorFlow's own frozen graph."""

import functools
import math
import struct
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bitgen.convert.entries import CONV, LINEAR, Entry, Ignore, Rule
from bitgen.convert.files import open_tensors
from bitgen.convert.rules import import_tensors
from bitgen.errors import UserError
from bitgen.evaluation.inception import SIZE, Inception, unit_names
from bitgen.hub import zoo

_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
_NORM_IN_GRAPH = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "moving_mean",
    "running_var": "moving_variance",
}


def find_weights(path: str = "") -> Path:
    """Returns the file of Inception's weights: `path`, zoo:NAME downloaded, or '' what is there.

    All files of the zoo hold the same network. Raises UserError if there is none: which file to
    get, and where to put it.
    """
    if path.startswith(zoo.PREFIX):
        return zoo.fetch_weights(path)
    known = list(zoo.WEIGHTS.values())
    for choice in [Path(path)] if path else map(zoo.placed, known):
        if choice.is_file():
            return choice
    names = " or ".join(zoo.PREFIX + entry.name for entry in known)
    place = zoo.placed(known[0])
    raise UserError(
        f"no Inception weights {path or 'in ' + str(place.parent)}: set config.evaluate.weights to "
        f"{names}, which is downloaded, or to a file; without a connection here, get {place.name} "
        f"from {known[0].url} and put it at {place}"
    )


def load_inception(path: str | Path) -> dict[str, Any]:
    """Returns the parameters of `Inception`, float32 numpy arrays, from a file of the zoo.

    Raises UserError for a file that cannot be read, and one that lists every tensor that is
    missing, unknown or of a wrong shape.
    """
    path = Path(path)
    if path.suffix == ".pb":
        tensors: Mapping[str, np.ndarray] = _from_graph(path)
    else:
        tensors = open_tensors(path)
    target = jax.eval_shape(
        lambda: Inception().init(jax.random.key(0), jnp.zeros((1, SIZE, SIZE, 3)))["params"]
    )
    try:
        return import_tensors(table(), tensors, target)[0]
    except UserError as e:
        raise UserError(f"{path} is not the Inception network of 2015-12-05: {e}") from None


def table() -> list[Entry]:
    """Returns the entries between the PyTorch ports' names and the parameters of `Inception`."""
    entries: list[Entry] = []
    for name, _ in unit_names():
        ours = name.replace(".", "_")
        entries.append(Rule(f"{name}.conv.weight", f"{ours}/conv/kernel", CONV))
        entries += [Rule(f"{name}.bn.{torch}", f"{ours}/{to}") for torch, to in _NORM.items()]
    return [
        *entries,
        Rule("fc.weight", "fc/kernel", LINEAR),
        Ignore("fc.bias", "Inception scores are defined without it"),
        Ignore("{name*}.num_batches_tracked", "a counter of training"),
        Ignore("AuxLogits.{name*}", "a classifier that only training uses"),
    ]


def _from_graph(path: Path) -> dict[str, np.ndarray]:
    """-> the graph's constants by the names, and in the layout, of the PyTorch ports."""
    try:
        constants = read_constants(path)
    except (ValueError, IndexError, struct.error) as e:
        raise UserError(f"{path} is no TensorFlow graph, or it is damaged: {e}") from None
    wanted: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {}
    for torch, graph in unit_names():
        wanted[f"{torch}.conv.weight"] = (
            f"{graph}/conv2d_params",
            lambda x: x.transpose(3, 2, 0, 1),
        )
        for name, there in _NORM_IN_GRAPH.items():
            wanted[f"{torch}.bn.{name}"] = (f"{graph}/batchnorm/{there}", np.asarray)
    wanted["fc.weight"] = ("softmax/weights", np.transpose)
    missing = [there for there, _ in wanted.values() if there not in constants]
    if missing:
        raise UserError(
            f"{path} lacks {missing[0]} ({len(missing)} of {len(wanted)} constants): it is not the "
            "Inception graph of 2015-12-05"
        )
    return {name: change(constants[there]()) for name, (there, change) in wanted.items()}


# ------------------------------------------------------------------- protocol buffers
def read_constants(path: str | Path) -> dict[str, Callable[[], np.ndarray]]:
    """Returns, by name, functions that give the float constants of a frozen graph (a GraphDef).

    Raises ValueError, IndexError or struct.error for a file of another kind.
    """
    found = {}
    for number, node in _fields(memoryview(Path(path).read_bytes())):
        if number != 1 or not isinstance(node, memoryview):  # GraphDef.node
            continue
        name, op, tensor = "", "", None
        for key, value in _fields(node):
            if key == 1:
                name = bytes(value).decode()
            elif key == 2:
                op = bytes(value).decode()
            elif key == 5:  # an attribute: its name and value
                attribute = dict(_fields(value))
                if bytes(attribute.get(1, b"")) == b"value":
                    tensor = dict(_fields(attribute[2])).get(8, tensor)
        if op == "Const" and tensor is not None and dict(_fields(tensor)).get(1) == 1:  # floats
            found[name] = functools.partial(_tensor, tensor)
    if not found:
        raise ValueError("no constant in it")
    return found


def _tensor(data: memoryview) -> np.ndarray:
    """TensorProto: shape, and values either as they lie in memory or as a list."""
    shape: tuple[int, ...] = ()
    content, values = b"", []
    for number, value in _fields(data):
        if number == 2:
            sides = [dict(_fields(side)) for key, side in _fields(value) if key == 2]
            shape = tuple(side.get(1, 0) for side in sides)
        elif number == 4:
            content = value
        elif number == 5:
            values.append(np.frombuffer(value, "<f4"))
    if len(content):
        return np.frombuffer(content, "<f4").reshape(shape).astype(np.float32)
    listed = np.concatenate(values) if values else np.zeros(1, np.float32)
    # The last value stands for all that are left out.
    last = np.full(math.prod(shape) - len(listed), listed[-1], np.float32)
    return np.concatenate([listed, last]).reshape(shape).astype(np.float32)


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Yields number and value of each field of a message: an int, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        kind = key & 7
        if kind == 0:
            value, at = _varint(data, at)
        elif kind in (1, 2, 5):
            length = {1: 8, 5: 4}.get(kind)
            if length is None:
                length, at = _varint(data, at)
            if at + length > len(data):
                raise ValueError("it ends too early")
            value, at = data[at : at + length], at + length
        else:
            raise ValueError(f"a field of unknown kind {kind}")
        yield key >> 3, value


def _varint(data: Any, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
