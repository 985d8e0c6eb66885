"""The conversion engine: applies a table of `entries` to a PyTorch file or to our parameters.

The same table runs both ways. Everything is checked by names and shapes before the first tensor is
read, and tensors are read one at a time: `plan_import` and `read_slices` together serve models that
are not to be held in memory whole.
"""

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from bitgen.convert.entries import (
    Alias,
    Carry,
    Constant,
    Ignore,
    Matcher,
    Rule,
    Shape,
    Table,
    placeholders,
    render,
)
from bitgen.convert.faults import Faults, show
from bitgen.errors import UserError


@dataclass(frozen=True)
class Fill:
    """The tensor `torch` is slice `index` (None: all) of our leaf `path`, `shape` in our layout."""

    rule: Rule
    torch: str
    path: str
    index: int | None
    shape: Shape

    @property
    def place(self) -> str:
        """Our path and slice, as errors print it."""
        return self.path if self.index is None else f"{self.path}[{self.index}]"


@dataclass(frozen=True)
class Plan:
    """Where every tensor of a file goes: what `plan_import` found to be complete."""

    leaves: dict[str, Shape]  # our path -> shape
    fills: list[Fill]  # grouped by path
    aliases: dict[str, str] = field(default_factory=dict)  # second name -> first
    carried: list[str] = field(default_factory=list)
    ignored: dict[str, str] = field(default_factory=dict)  # name -> reason


def import_tensors(
    table: Table, tensors: Mapping[str, Any], target: Mapping, dtype: Any = np.float32
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Returns our nested parameters and the carried tensors, both numpy, floats cast to `dtype`.

    `tensors` maps names to arrays (numpy, PyTorch on the CPU, or anything with `shape` that
    `np.asarray` reads), each read when its turn comes. `target` is the nested dict of
    ShapeDtypeStructs, or arrays, that the model's `eval_shape` gives. Raises UserError with every
    fault there is.
    """
    plan = plan_import(table, shapes_of(tensors), target)
    check_aliases(plan, tensors)
    flat = {path: np.empty(shape, dtype) for path, shape in plan.leaves.items()}
    for fill, value in read_slices(plan, tensors, dtype):
        flat[fill.path][... if fill.index is None else fill.index] = value
    carried = {name: to_numpy(tensors[name], dtype).copy() for name in plan.carried}
    return unflatten_dict(flat, sep="/"), carried


def shapes_of(tensors: Mapping[str, Any]) -> dict[str, Shape]:
    """Returns each tensor's shape; raises UserError if a value is not a tensor."""
    shapes = {}
    for name, value in tensors.items():
        if not hasattr(value, "shape"):
            kind = type(value).__name__
            raise UserError(f"{name!r} holds a {kind}, not a tensor: give the state dict itself")
        shapes[name] = tuple(int(n) for n in value.shape)
    return shapes


def plan_import(table: Table, shapes: Mapping[str, Shape], target: Mapping) -> Plan:
    """Returns where each tensor goes, from names and shapes alone.

    Raises UserError with all faults: tensors unknown, missing, used twice, misshaped or without a
    place in our model, and our leaves without a rule or with two.
    """
    faults = Faults()
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    leaves = _leaf_shapes(target)
    plan = Plan(leaves, _expand(table, leaves, faults))
    users = defaultdict(list)  # name -> what takes the tensor
    for fill in plan.fills:
        users[fill.torch].append(fill.place)
        if fill.torch in shapes:
            _check_shape(fill, shapes[fill.torch], faults)

    first_names = {fill.torch for fill in plan.fills}
    matches = _matcher(table, (Alias, Constant, Carry, Ignore), "torch")
    for name, shape in shapes.items():
        for entry, values in matches(name):
            users[name].append(type(entry).__name__.lower())
            expected = getattr(entry, "shape", None)
            if isinstance(entry, Alias):
                plan.aliases[name] = first = render(entry.of, values)
                expected = shapes.get(first)
                if first not in first_names:
                    faults.add("unknown", f"{name} (repeats {first})")
            elif isinstance(entry, Carry):
                plan.carried.append(name)
            elif isinstance(entry, Ignore):
                plan.ignored[name] = entry.reason
            if expected is not None and shape != tuple(expected):
                faults.add("misshaped", f"{name} is {show(shape)}, not {show(expected)}")

    for name, places in users.items():
        if len(places) > 1:
            faults.add("used twice", f"{name} ({', '.join(places)})")
    _add_unused(table, {n: s for n, s in shapes.items() if n not in users}, faults)
    _add_missing(table, plan.fills, shapes, faults)
    faults.raise_if_any("these tensors are not the ones that the model needs")
    return plan


def read_slices(
    plan: Plan, tensors: Mapping[str, Any], dtype: Any = np.float32
) -> Iterator[tuple[Fill, np.ndarray]]:
    """Yields each place of the plan and its values in our layout, one tensor in memory at a time.

    Slices of one leaf come one after another. Raises UserError for a tensor that holds no floats.
    """
    for fill in plan.fills:
        value = to_numpy(tensors[fill.torch], dtype)
        if not jnp.issubdtype(value.dtype, np.floating):
            raise UserError(f"tensor {fill.torch} holds {value.dtype}, expected floating point")
        yield fill, fill.rule.transform.forward(value)


def check_aliases(plan: Plan, tensors: Mapping[str, Any]) -> None:
    """Raises UserError unless every second name holds what its first name holds."""
    faults = Faults()
    for alias, first in plan.aliases.items():
        if not np.array_equal(to_numpy(tensors[alias]), to_numpy(tensors[first]), equal_nan=True):
            faults.add("unequal", f"{alias} and {first}")
    faults.raise_if_any("tensors that one module owns under two names differ")


def export_tensors(
    table: Table,
    params: Mapping,
    carried: Mapping[str, Any],
    hparams: Mapping[str, Any],
    target: Mapping | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Returns an iterator over every tensor of the PyTorch file, one in memory at a time.

    `params` is our nested dict of arrays (numpy or jax), `carried` what the import set aside
    (empty for a model that was not imported), `target` the shapes to check `params` against.
    Raises UserError with every fault, before the first tensor.
    """
    faults = Faults()
    leaves = flatten_dict(_plain(params), sep="/")
    fills = _expand(table, _leaf_shapes(params), faults)
    if target is not None:
        _compare(_leaf_shapes(params), _leaf_shapes(target), faults)
    used = {fill.rule for fill in fills}
    for entry in table:
        if isinstance(entry, Rule) and entry not in used:
            faults.add("missing", f"our {entry.ours} (for {entry.torch})")
    for fill in fills:
        _check_inverse(fill, faults)
    aliases = _aliases(table, [fill.torch for fill in fills])
    made = _made_on_export(table, carried, hparams, faults)
    seen = set()
    for name in [*(fill.torch for fill in fills), *aliases, *made]:
        if name in seen:
            faults.add("used twice", f"{name} (would be written twice)")
        seen.add(name)
    faults.raise_if_any("these parameters are not the ones that the PyTorch file needs")
    return _write(fills, aliases, leaves, made)


def to_numpy(value: Any, dtype: Any = None) -> np.ndarray:
    """Returns an array or PyTorch tensor as numpy, floats cast to `dtype` unless it is None.

    PyTorch's half types become float32 on the way, which is exact.
    """
    if hasattr(value, "detach"):
        value = value.detach()
        half = value.is_floating_point() and value.element_size() < 4
        value = (value.float() if half else value).numpy()
    array = np.asarray(value)
    if dtype is not None and jnp.issubdtype(array.dtype, np.floating):
        return array.astype(dtype, copy=False)
    return array


def _write(fills, aliases, leaves, made):
    second_names = defaultdict(list)
    for alias, first in aliases.items():
        second_names[first].append(alias)
    for fill in fills:
        leaf = leaves[fill.path]
        value = np.asarray(leaf if fill.index is None else leaf[fill.index])
        value = np.array(fill.rule.transform.backward(value), order="C")
        for name in (fill.torch, *second_names[fill.torch]):
            yield name, value
    for name, make in made.items():
        yield name, np.array(make(), order="C")


def _made_on_export(table, carried, hparams, faults) -> dict[str, Callable[[], np.ndarray]]:
    """The tensors that no leaf of ours holds: name -> function that returns it."""
    keepers = _matcher(table, Carry, "torch")
    made = {}
    for name, value in carried.items():
        entries = keepers(name)
        if not entries:
            faults.add("unknown", f"{name} {show(value.shape)} (among the carried ones)")
        for entry, _ in entries:
            if entry.shape is not None and tuple(value.shape) != tuple(entry.shape):
                faults.add("misshaped", f"{name} is {show(value.shape)}, not {show(entry.shape)}")
        made[name] = functools.partial(to_numpy, value)
    for entry in table:
        if isinstance(entry, Constant):
            made[entry.torch] = functools.partial(entry.make, hparams)
        elif isinstance(entry, Carry) and entry.torch not in made:
            if entry.default is not None and entry.shape is not None:
                made[entry.torch] = functools.partial(entry.default, entry.shape)
            elif not placeholders(entry.torch):
                faults.add("missing", f"{entry.torch} (to be carried over from an import)")
    return made


def _expand(table: Table, leaves: Mapping[str, Shape], faults: Faults) -> list[Fill]:
    """Every leaf, or slice of one, with the tensor that its rule names."""
    matches = _matcher(table, Rule, "ours")
    fills = []
    for path, shape in leaves.items():
        found = matches(path)
        if not found:
            faults.add("unfilled", f"{path} {show(shape)} (no rule)")
        if len(found) > 1:
            faults.add("filled twice", f"{path} ({', '.join(rule.torch for rule, _ in found)})")
        for rule, values in found:
            if rule.stack is None:
                fills.append(Fill(rule, render(rule.torch, values), path, None, shape))
            elif not shape:
                faults.add("unfilled", f"{path} [] (has no leading axis to stack on)")
            elif rule.slices and len(rule.slices) != shape[0]:
                faults.add("misshaped", f"our {path} {show(shape)} for {len(rule.slices)} slices")
            else:
                for i in range(shape[0]):
                    number = rule.slices[i] if rule.slices else str(i)
                    name = render(rule.torch, {**values, rule.stack: number})
                    fills.append(Fill(rule, name, path, i, shape[1:]))
    return fills


def _aliases(table: Table, names: Iterable[str]) -> dict[str, str]:
    """Second name -> first, for the first names given."""
    matches = _matcher(table, Alias, "of")
    return {render(e.torch, values): name for name in names for e, values in matches(name)}


def _add_unused(table: Table, shapes: Mapping[str, Shape], faults: Faults) -> None:
    rules = _matcher(table, Rule, "torch")
    for name, shape in shapes.items():
        if found := rules(name):
            faults.add("unfillable", f"{name} {show(shape)} (no room in {found[0][0].ours})")
        else:
            faults.add("unknown", f"{name} {show(shape)}")


def _add_missing(table: Table, fills: list[Fill], shapes: Mapping, faults: Faults) -> None:
    required = {fill.torch: f"for {fill.place}" for fill in fills}
    for alias, first in _aliases(table, list(required)).items():
        required[alias] = f"repeats {first}"
    for entry in table:
        if isinstance(entry, Carry) and not placeholders(entry.torch):
            required[entry.torch] = entry.reason
    for name, why in required.items():
        if name not in shapes:
            faults.add("missing", f"{name} ({why})")


def _matcher(table: Table, kinds: Any, side: str) -> Matcher:
    separator = "/" if side == "ours" else "."
    return Matcher([entry for entry in table if isinstance(entry, kinds)], side, separator)


def _check_shape(fill: Fill, shape: Shape, faults: Faults) -> None:
    try:
        # No memory: a broadcast scalar, which transposes and reshapes without a copy.
        got = fill.rule.transform.forward(np.broadcast_to(np.float32(0), shape)).shape
    except ValueError:
        got = None
    if got != fill.shape:
        becomes = "does not fit" if got is None else f"becomes {show(got)} but"
        line = f"{fill.torch} {show(shape)} {becomes} {fill.place} {show(fill.shape)}"
        faults.add("misshaped", line)


def _check_inverse(fill: Fill, faults: Faults) -> None:
    transform = fill.rule.transform
    try:
        there = transform.backward(np.broadcast_to(np.float32(0), fill.shape))
        back = transform.forward(there).shape
    except ValueError:
        back = None
    if back != fill.shape:
        faults.add("misshaped", f"our {fill.place} {show(fill.shape)} (for {fill.torch})")


def _compare(leaves, target, faults):
    for path, shape in target.items():
        if path not in leaves:
            faults.add("missing", f"our {path} {show(shape)}")
        elif leaves[path] != shape:
            faults.add("misshaped", f"our {path} is {show(leaves[path])}, not {show(shape)}")
    for path in leaves.keys() - target.keys():
        faults.add("unknown", f"our {path} {show(leaves[path])}")


def _plain(tree: Any) -> Any:
    return {k: _plain(v) for k, v in tree.items()} if isinstance(tree, Mapping) else tree


def _leaf_shapes(tree: Mapping) -> dict[str, Shape]:
    return {path: tuple(x.shape) for path, x in flatten_dict(_plain(tree), sep="/").items()}
