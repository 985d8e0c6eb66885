"""Inception's weights, from PyTorch's two ports or from TensorFlow's own frozen graph."""

import math
from collections.abc import Mapping
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
    """Returns the file of Inception's weights: `path`, zoo:NAME downloaded, or '' for the cache.

    All files of the zoo hold the same network. Raises UserError if there is none, with the file to
    get and where to put it.
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

    Raises UserError for a file that cannot be read, and one with all tensors that are missing,
    unknown or misshaped.
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
    """Returns the graph's constants by the names, and in the layout, of the PyTorch ports."""
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.graph_pb2 import GraphDef

    try:
        graph = GraphDef.FromString(path.read_bytes())
    except DecodeError as e:
        raise UserError(f"{path} is not a TensorFlow graph, or it is damaged: {e}") from None
    constants = {n.name: n.attr["value"].tensor for n in graph.node if n.op == "Const"}
    tensors, missing = {}, []

    def read(name: str, there: str, *axes: int) -> None:
        if there in constants:
            tensors[name] = _values(constants[there]).transpose(axes or None)
        else:
            missing.append(there)

    for torch, unit in unit_names():
        read(f"{torch}.conv.weight", f"{unit}/conv2d_params", 3, 2, 0, 1)
        for name, there in _NORM_IN_GRAPH.items():
            read(f"{torch}.bn.{name}", f"{unit}/batchnorm/{there}")
    read("fc.weight", "softmax/weights")
    if missing:
        raise UserError(
            f"{path} lacks {missing[0]} ({len(missing)} of {len(missing) + len(tensors)} "
            "constants): it is not the Inception graph of 2015-12-05"
        )
    return tensors


def _values(tensor: Any) -> np.ndarray:
    """Returns the array of a TensorProto, which may leave out values equal to the last listed."""
    from tensorboard.util.tensor_util import make_ndarray

    if listed := tensor.float_val:
        count = math.prod(side.size for side in tensor.tensor_shape.dim)
        listed.extend([listed[-1]] * (count - len(listed)))
    return make_ndarray(tensor)
