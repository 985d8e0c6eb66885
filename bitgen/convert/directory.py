"""Converts a checkpoint file to a model directory, and back to a file for the original code."""

import dataclasses
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from flax.errors import FlaxError
from flax.traverse_util import unflatten_dict

from bitgen import build
from bitgen.convert import bigr, binary_ae, bitdance, bitvae, dcae, gfq_ae
from bitgen.convert.entries import Shape
from bitgen.convert.files import TORCH_SUFFIXES, Tensors, check_space, write_torch
from bitgen.convert.rules import Plan, check_aliases, export_tensors, plan_import, read_slices
from bitgen.convert.shards import open_checkpoint
from bitgen.errors import UserError, choose, first_line
from bitgen.hub import model_directory, zoo
from bitgen.hub.streaming import LazyArray
from bitgen.runtime.progress import ProgressBar


class Family(NamedTuple):
    """How the files of one family are read and written."""

    kind: str  # tokenizer or generator
    convert: ModuleType  # with table, recognise and, where names vary, wrapping
    wrapped: str | None  # the key under which released files hold the state dict


FAMILIES = {
    "binary_ae": Family("tokenizer", binary_ae, None),
    "bigr": Family("generator", bigr, "ema"),
    "bitdance": Family("generator", bitdance, "ema"),
    "gfq_ae": Family("tokenizer", gfq_ae, "state_dict"),
    "bitvae": Family("tokenizer", bitvae, "vae"),
    "dcae": Family("tokenizer", dcae, "state_dict"),
}


def find_wrapping(convert: ModuleType, shapes: Mapping[str, Shape]) -> dict[str, Any]:
    """Returns what a family's `table` needs to know of a file besides the settings."""
    return convert.wrapping(shapes) if hasattr(convert, "wrapping") else {}


class Imported(NamedTuple):
    """The result of an import."""

    info: dict[str, Any]  # model.json
    parameters: int
    plan: Plan
    others: tuple[str, ...]  # what else the file holds, in words


def import_file(
    source: str | os.PathLike,
    directory: str | os.PathLike,
    model: str | None = None,
    weights: Literal["ema", "model"] | None = None,
    dtype: str = "float32",
) -> Imported:
    """Converts a checkpoint file to a model directory.

    Args:
      source: a PyTorch or safetensors file, an index of shards, or a folder with one of these; the
        names and shapes of its tensors tell family and sizes.
      directory: where to; it appears, or replaces a model directory there, only when complete.
      model: name in the zoo, which overrides what the file tells.
      weights: which set of a file with several; by default 'ema' if there is one.
      dtype: of the parameters in the directory, float32 or bfloat16.

    Raises UserError for a file that cannot be read, is of no known family or of another than
    `model`, or whose tensors are not exactly those of the model.
    """
    to_dtype = np.dtype(choose("dtype", dtype, build.DTYPES))
    directory = Path(os.path.abspath(directory))
    model_directory.check_replaceable(directory)
    tensors = open_checkpoint(source, weights)
    family, hparams, looks_like = _recognise(tensors, model)
    kind, convert, _ = FAMILIES[family]
    wrapping = find_wrapping(convert, tensors.shapes)
    try:
        target = _target(kind, family, hparams)
        plan = plan_import(convert.table(hparams, **wrapping), tensors.shapes, target)
        # Names of the same place in the file need no comparison.
        places = tensors.places
        others = {a: b for a, b in plan.aliases.items() if places[a] != places[b]}
        check_aliases(dataclasses.replace(plan, aliases=others), tensors)
    except UserError as e:
        raise UserError(f"{looks_like}; {e}") from None
    count = sum(map(math.prod, plan.leaves.values()))
    aside = sum(math.prod(tensors.shapes[name]) for name in plan.carried)
    total = count * to_dtype.itemsize + aside * 4
    check_space(directory, total)

    entry = zoo.get(model) if model else zoo.find(family, hparams)
    info = {
        "kind": kind,
        "family": family,
        "hparams": zoo.complete(kind, family, hparams),
        "origin": {
            "file": tensors.path.name,
            "bytes": tensors.bytes,
            "weights": tensors.wrapped,
            "zoo": entry.name if entry else None,
            "dtype": dtype,
        },
        "wrapping": wrapping,
    }
    with ProgressBar("converting", total, unit="B", lines=False) as bar:
        params = _lazy_params(plan, tensors, to_dtype, bar)
        carried = _counted(bar, ((name, tensors[name]) for name in plan.carried))
        model_directory.write(directory, info, params, carried)
    return Imported(model_directory.read_info(directory), count, plan, tensors.others)


def export_file(
    directory: str | os.PathLike,
    output: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
) -> int:
    """Writes the file that the original PyTorch code loads, and returns its number of tensors.

    Args:
      directory: a model directory, imported or trained here, or zoo:NAME.
      output: a .pt, .pth or .th file; it appears, or replaces the one before, only when complete.
      tokenizer: a model directory to include, as BitDance's loader demands; not for an imported
        model, which keeps its own.
    """
    output = Path(output)
    if output.suffix not in TORCH_SUFFIXES or output.is_dir():
        raise UserError(f"{output} is not the name of a {', '.join(TORCH_SUFFIXES)} file")
    model = _export(directory)
    tensors, size = model.tensors, model.size
    if tokenizer is not None:
        inner = _export(tokenizer)
        if (model.family, inner.family) != ("bitdance", "gfq_ae") or model.carried:
            raise UserError(
                "only the file of a bitdance trained here takes a tokenizer, a gfq_ae: "
                f"{directory} is a {model.family}{' with its own' if model.carried else ''}, "
                f"{tokenizer} a {inner.family}"
            )
        renamed = ((f"vae.{name}", value) for name, value in inner.tensors)
        tensors, size = itertools.chain(tensors, renamed), size + inner.size
    check_space(output.parent, size)
    with ProgressBar("writing", size, unit="B", lines=False) as bar:
        return write_torch(output, _counted(bar, tensors), FAMILIES[model.family].wrapped)


class _Export(NamedTuple):
    family: str
    tensors: Iterable[tuple[str, np.ndarray]]
    carried: bool
    size: int  # bytes


def _export(directory: str | os.PathLike) -> _Export:
    """Returns the PyTorch tensors of a model directory, each made when it is read."""
    info = model_directory.read_info(directory)
    kind, convert, _ = choose("family", info["family"], FAMILIES)
    hparams, wrapping = zoo.tuples(info["hparams"]), zoo.tuples(info.get("wrapping", {}))
    target = _target(kind, info["family"], hparams)
    params = model_directory.open_params(directory)
    carried = model_directory.load_carried(directory)
    try:
        tensors = export_tensors(
            convert.table(hparams, **wrapping), params, carried, hparams, target
        )
    except UserError as e:
        raise UserError(f"{directory} cannot be written as a PyTorch file; {e}") from None
    arrays = [*jax.tree.leaves(params), *carried.values()]
    size = sum(x.dtype.itemsize * math.prod(x.shape) for x in arrays)
    return _Export(info["family"], tensors, bool(carried), size)


def _recognise(tensors: Tensors, model: str | None) -> tuple[str, dict[str, Any], str]:
    """Returns family, settings, and the beginning of an error about the tensors."""
    path, shapes = tensors.path, tensors.shapes
    entry = zoo.get(model) if model else None
    found = ((name, family.convert.recognise(shapes)) for name, family in FAMILIES.items())
    family, hparams = next(((name, h) for name, h in found if h is not None), (None, None))
    if family is None or hparams is None:
        if entry is None:
            names = ", ".join(list(shapes)[:3])
            raise UserError(
                f"{path} is not recognised: bitgen reads files of {sorted(FAMILIES)}, and this one "
                f"has {len(shapes)} tensors, {names} ...; --model=NAME tells what it lacks"
            )
        return entry.family, zoo.settings(entry), f"{path} is not recognised as {entry.name}"
    words = f"{path}: this looks like a {family} checkpoint: {zoo.describe(family, hparams)}"
    if entry is None:
        return family, hparams, words
    if entry.family != family:
        raise UserError(f"{words}; {entry.name} is a {entry.family}")
    if zoo.describe(family, hparams) != zoo.describe(family, zoo.settings(entry)):
        words += f", not {entry.name} ({entry.size})"
    return family, zoo.settings(entry), words


def _target(kind: str, family: str, hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the shapes of a model's parameters; raises UserError if the settings make none."""
    try:
        return build.param_shapes(build.make_module(kind, family, dict(hparams)))
    except (ValueError, TypeError, ZeroDivisionError, FlaxError) as e:
        raise UserError(f"its sizes make no model ({first_line(e)}): {dict(hparams)}") from None


def _lazy_params(plan: Plan, tensors: Tensors, dtype: np.dtype, bar: ProgressBar) -> dict[str, Any]:
    """Returns our nested parameters, each read from the file when it is written."""
    fills = defaultdict(list)
    for fill in plan.fills:
        fills[fill.path].append(fill)

    def lazy(path: str, shape: Shape) -> LazyArray:
        def make() -> np.ndarray:
            array = np.empty(shape, dtype)
            try:
                for fill, value in read_slices(fills[path], tensors, dtype):
                    array[... if fill.index is None else fill.index] = value
                    bar.add(value.nbytes)
            except UserError as e:
                raise UserError(f"{tensors.path}: {e}") from None
            return array

        return LazyArray(shape, dtype, make)

    leaves = {path: lazy(path, shape) for path, shape in plan.leaves.items()}
    return unflatten_dict(leaves, sep="/")


def _counted(
    bar: ProgressBar, named: Iterable[tuple[str, np.ndarray]]
) -> Iterator[tuple[str, np.ndarray]]:
    for name, value in named:
        bar.add(value.nbytes)
        yield name, value
