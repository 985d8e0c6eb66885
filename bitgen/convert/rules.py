"""The conversion engine: applies a table of `entries` to a PyTorch file or to our parameters.

The same table runs both ways. Everything is checked by names and shapes before the first tensor is
read, and tensors are read one at a time: `plan_import` and `read_slices` together serve models that
are not to be held in memory whole.
"""

import functools
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
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
from bitgen.errors import UserError

Faults = defaultdict[str, list[str]]  # kind -> a line for each fault
_KINDS = {
    "unknown": "unknown tensors",
    "missing": "missing tensors",
    "misshaped": "misshaped tensors",
    "used twice": "tensors used twice",
    "unequal": "unequal tensors",
    "unfillable": "tensors without a place in our model",
    "unfilled": "leaves of our model without a rule",
    "filled twice": "leaves of our model with two rules",
}
_SHOWN = 6  # faults of one kind that an error spells out


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
    for fill, value in read_slices(plan.fills, tensors, dtype):
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
    faults = Faults(list)
    shapes = {name: tuple(shape) for name, shape in shapes.items()}
    leaves = _leaf_shapes(target)
    plan = Plan(leaves, _expand(table, leaves, faults))
    users = defaultdict(list)  # name -> what takes the tensor
    for fill in plan.fills:
        users[fill.torch].append(fill.place)
        if fill.torch in shapes:
            _check_shape(fill, shapes[fill.torch], faults)

    first_names = {fill.torch for fill in plan.fills}
    matches = Matcher(table, (Alias, Constant, Carry, Ignore), "torch")
    rules = Matcher(table, Rule, "torch")
    for name, shape in shapes.items():
        for entry, values in matches(name):
            users[name].append(type(entry).__name__.lower())
            expected = getattr(entry, "shape", None)
            if isinstance(entry, Alias):
                plan.aliases[name] = first = render(entry.of, values)
                expected = shapes.get(first)
                if first not in first_names:
                    faults["unknown"].append(f"{name} (repeats {first})")
            elif isinstance(entry, Carry):
                plan.carried.append(name)
            elif isinstance(entry, Ignore):
                plan.ignored[name] = entry.reason
            _check_equal(name, shape, expected, faults)
        if name not in users:
            if found := rules(name):
                line = f"{name} {list(shape)} (no room in {found[0][0].ours})"
                faults["unfillable"].append(line)
            else:
                faults["unknown"].append(f"{name} {list(shape)}")

    for name, places in users.items():
        if len(places) > 1:
            faults["used twice"].append(f"{name} ({', '.join(places)})")
    for name, why in _required(table, plan.fills).items():
        if name not in shapes:
            faults["missing"].append(f"{name} ({why})")
    _raise(faults, "these tensors are not the ones that the model needs")
    return plan


def read_slices(
    fills: list[Fill], tensors: Mapping[str, Any], dtype: Any = np.float32
) -> Iterator[tuple[Fill, np.ndarray]]:
    """Yields each place of a plan and its values in our layout, one tensor in memory at a time.

    Raises UserError for a tensor that holds no floats.
    """
    for fill in fills:
        value = to_numpy(tensors[fill.torch], dtype)
        if not jnp.issubdtype(value.dtype, np.floating):
            raise UserError(f"tensor {fill.torch} holds {value.dtype}, expected floating point")
        yield fill, fill.rule.transform.forward(value)


def check_aliases(plan: Plan, tensors: Mapping[str, Any]) -> None:
    """Raises UserError unless every second name holds what its first name holds."""
    faults = Faults(list)
    for alias, first in plan.aliases.items():
        if not np.array_equal(to_numpy(tensors[alias]), to_numpy(tensors[first]), equal_nan=True):
            faults["unequal"].append(f"{alias} and {first}")
    _raise(faults, "tensors that one module owns under two names differ")


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
    faults = Faults(list)
    leaves = flatten_dict(params, sep="/")
    fills = _expand(table, _leaf_shapes(params), faults)
    if target is not None:
        _compare(_leaf_shapes(params), _leaf_shapes(target), faults)
    used = {fill.rule for fill in fills}
    for entry in table:
        if isinstance(entry, Rule) and entry not in used:
            faults["missing"].append(f"our {entry.ours} (for {entry.torch})")
    for fill in fills:
        transform = fill.rule.transform
        if _reshaped(lambda x, t=transform: t.forward(t.backward(x)), fill.shape) != fill.shape:
            line = f"our {fill.place} {list(fill.shape)} (for {fill.torch})"
            faults["misshaped"].append(line)
    aliases = _aliases(table, fills)
    made = _made_on_export(table, carried, hparams, faults)
    names = Counter([*(fill.torch for fill in fills), *aliases, *made])
    faults["used twice"] += [f"{n} (would be written twice)" for n, k in names.items() if k > 1]
    _raise(faults, "these parameters are not the ones that the PyTorch file needs")
    return _write(fills, aliases, leaves, made)


def torch_shapes(table: Table, target: Mapping) -> dict[str, Shape]:
    """Returns names and shapes of the tensors that the rules of a table read or write."""
    fills = _expand(table, _leaf_shapes(target), Faults(list))
    return {fill.torch: fill.rule.transform.backward(_zeros(fill.shape)).shape for fill in fills}


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
    keepers = Matcher(table, Carry, "torch")
    made = {}
    for name, value in carried.items():
        entries = keepers(name)
        if not entries:
            faults["unknown"].append(f"{name} {list(value.shape)} (among the carried ones)")
        for entry, _ in entries:
            _check_equal(name, tuple(value.shape), entry.shape, faults)
        made[name] = functools.partial(to_numpy, value)
    for entry in table:
        if isinstance(entry, Constant):
            made[entry.torch] = functools.partial(entry.make, hparams)
        elif isinstance(entry, Carry) and entry.torch not in made:
            if entry.zeros is not None and entry.shape is not None:
                made[entry.torch] = functools.partial(np.zeros, entry.shape, entry.zeros)
            elif not placeholders(entry.torch):
                faults["missing"].append(f"{entry.torch} (to be carried over from an import)")
    return made


def _expand(table: Table, leaves: Mapping[str, Shape], faults: Faults) -> list[Fill]:
    """Every leaf, or slice of one, with the tensor that its rule names."""
    matches = Matcher(table, Rule, "ours")
    fills = []
    for path, shape in leaves.items():
        found = matches(path)
        if not found:
            faults["unfilled"].append(f"{path} {list(shape)} (no rule)")
        if len(found) > 1:
            names = ", ".join(rule.torch for rule, _ in found)
            faults["filled twice"].append(f"{path} ({names})")
        for rule, values in found:
            if rule.stack is None:
                fills.append(Fill(rule, render(rule.torch, values), path, None, shape))
            elif not shape:
                faults["unfilled"].append(f"{path} [] (has no leading axis to stack on)")
            elif rule.slices and len(rule.slices) != shape[0]:
                line = f"our {path} {list(shape)} for {len(rule.slices)} slices"
                faults["misshaped"].append(line)
            else:
                for i, number in enumerate(rule.slices or range(shape[0])):
                    name = render(rule.torch, {**values, rule.stack: str(number)})
                    fills.append(Fill(rule, name, path, i, shape[1:]))
    return fills


def _aliases(table: Table, fills: list[Fill]) -> dict[str, str]:
    """Second name -> first."""
    matches = Matcher(table, Alias, "of")
    names = [fill.torch for fill in fills]
    return {render(e.torch, values): name for name in names for e, values in matches(name)}


def _required(table: Table, fills: list[Fill]) -> dict[str, str]:
    """The names that a file must have -> why."""
    kept = [entry for entry in table if isinstance(entry, Carry)]
    return {
        **{fill.torch: f"for {fill.place}" for fill in fills},
        **{alias: f"repeats {first}" for alias, first in _aliases(table, fills).items()},
        **{entry.torch: entry.reason for entry in kept if not placeholders(entry.torch)},
    }


def _zeros(shape: Shape) -> np.ndarray:
    """An array without memory, which transposes and reshapes without a copy."""
    return np.broadcast_to(np.float32(0), shape)


def _reshaped(change: Callable[[np.ndarray], np.ndarray], shape: Shape) -> Shape | None:
    """The shape of what a function makes of an array, None if it cannot take the shape."""
    try:
        return change(_zeros(shape)).shape
    except ValueError:
        return None


def _check_shape(fill: Fill, shape: Shape, faults: Faults) -> None:
    got = _reshaped(fill.rule.transform.forward, shape)
    if got != fill.shape:
        becomes = "does not fit" if got is None else f"becomes {list(got)} but"
        line = f"{fill.torch} {list(shape)} {becomes} {fill.place} {list(fill.shape)}"
        faults["misshaped"].append(line)


def _check_equal(name: str, shape: Shape, expected: Shape | None, faults: Faults) -> None:
    if expected is not None and shape != tuple(expected):
        faults["misshaped"].append(f"{name} is {list(shape)}, not {list(expected)}")


def _compare(leaves, target, faults):
    for path, shape in target.items():
        if path not in leaves:
            faults["missing"].append(f"our {path} {list(shape)}")
        else:
            _check_equal(f"our {path}", leaves[path], shape, faults)
    for path in leaves.keys() - target.keys():
        faults["unknown"].append(f"our {path} {list(leaves[path])}")


def _leaf_shapes(tree: Mapping) -> dict[str, Shape]:
    return {path: tuple(x.shape) for path, x in flatten_dict(tree, sep="/").items()}


def _raise(faults: Faults, what: str) -> None:
    """Raises UserError that begins with `what` and has one line a kind, if there are faults."""
    lines = []
    for kind, title in _KINDS.items():
        if found := sorted(faults[kind], key=_natural):
            more = f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
            lines.append(f"  {len(found)} {title}: {'; '.join(found[:_SHOWN])}{more}")
    if lines:
        raise UserError("\n".join([f"{what}:", *lines]))


def _natural(line: str) -> list[tuple[int, str]]:
    """Sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", line)]
