"""The conversion engine: what it fills, writes back, and refuses, on tables of a few tensors."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bitgen.convert.entries import (
    CONV,
    LINEAR,
    POINTWISE,
    Alias,
    Carry,
    Constant,
    Ignore,
    Rule,
    permute,
    shape_votes,
    squeeze,
)
from bitgen.convert.rules import (
    check_aliases,
    export_tensors,
    import_tensors,
    plan_import,
    read_slices,
    to_numpy,
)
from bitgen.errors import UserError

TABLE = [
    Rule("stem.weight", "stem/kernel", CONV),
    Rule("head.{name}.weight", "head/{name}/kernel", LINEAR),
    Rule("layers.{layer}.w", "layers/w", LINEAR, stack="layer"),
    Rule("layers.{layer}.sub.{i}.b", "layers/sub_{i}/b", stack="layer"),
    Alias("twin.{rest*}", of="head.{rest*}"),
    Constant("steps", lambda hparams: np.arange(hparams["steps"], dtype=np.float32), (4,)),
    Carry("spare", "a layer that no computation uses", (2, 5), np.float32),
    Carry("kept.{rest*}", "training state"),
    Ignore("vgg.{rest*}", "a fixed network"),
]
SHAPES = {
    "stem.weight": (6, 3, 2, 1),
    "head.a.weight": (4, 6),
    "head.b.weight": (5, 6),
    "layers.0.w": (3, 2),
    "layers.1.w": (3, 2),
    "layers.2.w": (3, 2),
    "layers.0.sub.0.b": (7,),
    "layers.1.sub.0.b": (7,),
    "layers.2.sub.0.b": (7,),
    "twin.a.weight": (4, 6),
    "twin.b.weight": (5, 6),
    "steps": (4,),
    "spare": (2, 5),
    "kept.deep.er": (1, 2),
    "vgg.0.weight": (9,),
}
HPARAMS = {"steps": 4}


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


TARGET = {
    "stem": {"kernel": leaf(2, 1, 3, 6)},
    "head": {"a": {"kernel": leaf(6, 4)}, "b": {"kernel": leaf(6, 5)}},
    "layers": {"w": leaf(3, 2, 3), "sub_0": {"b": leaf(3, 7)}},
}


def make_tensors(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    tensors = {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}
    for name in ("a", "b"):
        tensors[f"twin.{name}.weight"] = tensors[f"head.{name}.weight"].copy()
    tensors["steps"] = np.arange(4, dtype=dtype)
    return tensors


def faults(table=TABLE, target=TARGET, **changes):
    """The message for SHAPES with some shapes changed; None leaves a tensor out."""
    shapes = {**SHAPES, **changes}
    with pytest.raises(UserError) as raised:
        plan_import(table, {n: s for n, s in shapes.items() if s is not None}, target)
    return str(raised.value)


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_imports_every_leaf_and_slice_and_sets_the_rest_aside(kind):
    arrays = make_tensors()
    tensors = arrays if kind == "numpy" else {n: torch.from_numpy(x) for n, x in arrays.items()}
    params, carried = import_tensors(TABLE, tensors, TARGET)
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda x: x.shape, TARGET)
    np.testing.assert_array_equal(
        params["stem"]["kernel"], arrays["stem.weight"].transpose(2, 3, 1, 0)
    )
    np.testing.assert_array_equal(params["head"]["b"]["kernel"], arrays["head.b.weight"].T)
    for i in range(3):
        np.testing.assert_array_equal(params["layers"]["w"][i], arrays[f"layers.{i}.w"].T)
        np.testing.assert_array_equal(
            params["layers"]["sub_0"]["b"][i], arrays[f"layers.{i}.sub.0.b"]
        )
    assert carried.keys() == {"spare", "kept.deep.er"}
    np.testing.assert_array_equal(carried["spare"], arrays["spare"])


def test_params_do_not_share_memory_with_the_file():
    tensors = make_tensors()
    params, carried = import_tensors(TABLE, tensors, TARGET)
    before = params["layers"]["sub_0"]["b"][0].copy(), carried["spare"].copy()
    tensors["layers.0.sub.0.b"][:] = 0
    tensors["spare"][:] = 0
    np.testing.assert_array_equal(params["layers"]["sub_0"]["b"][0], before[0])
    np.testing.assert_array_equal(carried["spare"], before[1])


def test_round_trip_is_exact_and_complete():
    tensors = make_tensors()
    params, carried = import_tensors(TABLE, tensors, TARGET)
    on_device = jax.tree.map(jnp.asarray, params)
    written = dict(export_tensors(TABLE, on_device, carried, HPARAMS, TARGET))
    assert written.keys() == SHAPES.keys() - {"vgg.0.weight"}
    for name, value in written.items():
        assert value.dtype == np.float32
        assert value.flags.c_contiguous
        assert value.tobytes() == tensors[name].tobytes(), name


def test_export_of_a_model_that_was_not_imported_makes_defaults_and_constants():
    params, _ = import_tensors(TABLE, make_tensors(), TARGET)
    written = dict(export_tensors(TABLE, params, {}, HPARAMS))
    np.testing.assert_array_equal(written["spare"], np.zeros((2, 5)))
    np.testing.assert_array_equal(written["steps"], [0, 1, 2, 3])
    assert "kept.deep.er" not in written


def test_a_constant_may_be_left_out_of_the_file():
    tensors = make_tensors()
    del tensors["steps"]
    import_tensors(TABLE, tensors, TARGET)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_files_become_float32_unless_told(half):
    tensors = {name: torch.from_numpy(x).to(half) for name, x in make_tensors().items()}
    params, carried = import_tensors(TABLE, tensors, TARGET)
    expected = tensors["stem.weight"].float().numpy().transpose(2, 3, 1, 0)
    assert params["stem"]["kernel"].dtype == carried["spare"].dtype == np.float32
    np.testing.assert_array_equal(params["stem"]["kernel"], expected)
    params, _ = import_tensors(TABLE, tensors, TARGET, dtype=jnp.bfloat16)
    assert params["stem"]["kernel"].dtype == jnp.bfloat16
    if half == torch.bfloat16:
        np.testing.assert_array_equal(params["stem"]["kernel"].astype(np.float32), expected)


def test_integers_are_carried_as_they_are_and_never_become_weights():
    table = [*TABLE, Carry("count", "batches seen", ())]
    tensors = {**make_tensors(), "count": torch.tensor(7)}
    _, carried = import_tensors(table, tensors, TARGET)
    assert carried["count"].dtype == np.int64
    assert carried["count"].shape == ()
    params, _ = import_tensors(table, tensors, TARGET)
    assert dict(export_tensors(table, params, carried, HPARAMS))["count"] == 7
    tensors["layers.1.w"] = np.ones((3, 2), np.int8)
    with pytest.raises(UserError, match=re.escape("tensor layers.1.w holds int8")):
        import_tensors(table, tensors, TARGET)


class Counting:
    """A tensor on disk: knows its shape, and is read when numpy asks."""

    reads = 0

    def __init__(self, value):
        self.value, self.shape = value, value.shape

    def __array__(self, dtype=None, copy=None):
        Counting.reads += 1
        return self.value


def test_faults_are_found_before_anything_is_read_and_slices_come_in_order():
    tensors = {name: Counting(x) for name, x in make_tensors().items()}
    Counting.reads = 0
    with pytest.raises(UserError):
        import_tensors(TABLE, {**tensors, "stray": tensors["spare"]}, TARGET)
    assert Counting.reads == 0
    plan = plan_import(TABLE, {n: x.shape for n, x in tensors.items()}, TARGET)
    assert plan.ignored == {"vgg.0.weight": "a fixed network"}
    places = []
    for fill, value in read_slices(plan.fills, tensors):
        assert len(places) + 1 == Counting.reads
        assert value.shape == fill.shape
        places.append((fill.path, fill.index))
    assert [p for p in places if p[0] == "layers/w"] == [("layers/w", i) for i in range(3)]
    paths = [path for path, _ in places]
    assert paths == sorted(paths, key=list(plan.leaves).index)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("stray.w", (2,), "1 unknown tensors: stray.w [2]"),
        ("stem.weight", None, "1 missing tensors: stem.weight (for stem/kernel)"),
        ("layers.1.w", None, "1 missing tensors: layers.1.w (for layers/w[1])"),
        ("twin.a.weight", None, "twin.a.weight (repeats head.a.weight)"),
        ("spare", None, "spare (a layer that no computation uses)"),
        ("layers.2.w", (2, 3), "layers.2.w [2, 3] becomes [3, 2] but layers/w[2] [2, 3]"),
        ("stem.weight", (6, 3), "stem.weight [6, 3] does not fit stem/kernel [2, 1, 3, 6]"),
        ("spare", (5, 2), "spare is [5, 2], not [2, 5]"),
        ("steps", (5,), "steps is [5], not [4]"),
        ("twin.b.weight", (6, 5), "twin.b.weight is [6, 5], not [5, 6]"),
        ("layers.00.w", (3, 2), "layers.00.w [3, 2] (no room in layers/w)"),  # zero-padded
    ],
)
def test_a_fault_in_the_file_is_named(name, shape, message):
    assert message in faults(**{name: shape})


def test_import_fault_no_place_for_it():
    changes = {"layers.3.w": (3, 2), "head.c.weight": (5, 6), "twin.c.weight": (5, 6)}
    message = faults(**changes)
    assert "2 tensors without a place in our model" in message
    assert "layers.3.w [3, 2] (no room in layers/w)" in message
    assert "head.c.weight [5, 6] (no room in head/{name}/kernel)" in message
    assert "1 unknown tensors: twin.c.weight (repeats head.c.weight)" in message


def test_import_fault_tensor_used_twice():
    table = [*TABLE, Ignore("stem.{rest*}", "mistaken")]
    assert "1 tensors used twice: stem.weight (stem/kernel, ignore)" in faults(table)
    table = [*TABLE, Rule("stem.weight", "other", CONV)]
    target = {**TARGET, "other": leaf(2, 1, 3, 6)}
    assert "stem.weight (stem/kernel, other)" in faults(table, target)


def test_import_fault_leaf_with_two_rules_or_none():
    table = [*TABLE, Rule("{any}.weight", "{any}/kernel", CONV)]
    assert "1 leaves of our model with two rules: stem/kernel" in faults(table)
    target = {**TARGET, "extra": {"bias": leaf(3)}}
    assert "1 leaves of our model without a rule: extra/bias [3]" in faults(target=target)
    target = {**TARGET, "layers": {**TARGET["layers"], "w": leaf()}}
    assert "layers/w [] (has no leading axis to stack on)" in faults(target=target)


def test_all_faults_come_in_one_error_with_long_lists_cut():
    others = {"spare": (1,), "stem.weight": None, "layers.7.w": (3, 2)}
    message = faults(**{f"stray{i}": (i,) for i in range(20)}, **others)
    lines = message.splitlines()
    assert lines[0] == "these tensors are not the ones that the model needs:"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        "20 unknown tensors",
        "1 missing tensors",
        "1 misshaped tensors",
        "1 tensors without a place in our model",
    ]
    assert "stray0 [0]; stray1 [1]; stray2 [2]" in lines[1]
    assert lines[1].endswith("; and 14 more")


def test_aliases_must_agree_but_may_both_be_nan():
    tensors = make_tensors()
    tensors["head.b.weight"][0, 0] = tensors["twin.b.weight"][0, 0] = np.nan
    import_tensors(TABLE, tensors, TARGET)
    tensors["twin.a.weight"][2, 3] += 1
    with pytest.raises(UserError, match=re.escape("twin.a.weight and head.a.weight")):
        import_tensors(TABLE, tensors, TARGET)
    plan = plan_import(TABLE, {n: x.shape for n, x in tensors.items()}, TARGET)
    with pytest.raises(UserError, match="1 unequal tensors"):
        check_aliases(plan, tensors)


def test_a_wrapped_state_dict_is_named():
    with pytest.raises(UserError, match="'ema' holds a dict, not a tensor"):
        import_tensors(TABLE, {"ema": make_tensors()}, TARGET)


def export_faults(params=None, carried=None, table=TABLE, target=None):
    imported, aside = import_tensors(TABLE, make_tensors(), TARGET)
    carried = aside if carried is None else carried
    with pytest.raises(UserError) as raised:
        # Not consumed: the faults must come before the first tensor.
        export_tensors(table, {**imported, **(params or {})}, carried, HPARAMS, target)
    return str(raised.value)


def test_export_faults():
    assert "extra/bias [3] (no rule)" in export_faults({"extra": {"bias": np.zeros(3)}})
    assert "our stem/kernel (for stem.weight)" in export_faults({"stem": {}})
    assert "our stem/kernel [2] (for stem.weight)" in export_faults(
        {"stem": {"kernel": np.zeros(2)}}
    )
    assert "stray [3] (among the carried ones)" in export_faults(carried={"stray": np.zeros(3)})
    assert "spare is [3], not [2, 5]" in export_faults(carried={"spare": np.zeros(3)})
    table = [*TABLE, Carry("lost", "needed", (2,))]
    assert "lost (to be carried over from an import)" in export_faults(table=table)
    table = [*TABLE, Constant("stem.weight", lambda hparams: np.zeros(1))]
    assert "stem.weight (would be written twice)" in export_faults(table=table)


def test_export_faults_against_the_model():
    shorter = {"layers": {"w": np.zeros((2, 2, 3)), "sub_0": {"b": np.zeros((3, 7))}}}
    message = export_faults(shorter, target={**TARGET, "extra": leaf(1)})
    assert "our layers/w is [2, 2, 3], not [3, 2, 3]" in message
    assert "our extra [1]" in message


@pytest.mark.parametrize(
    ("transform", "shape", "ours"),
    [
        (LINEAR, (3, 4), (4, 3)),
        (CONV, (5, 4, 3, 2), (3, 2, 4, 5)),
        (POINTWISE, (5, 4, 1, 1), (4, 5)),
        (squeeze(0, 1), (1, 1, 6, 3), (6, 3)),
        (permute(1, 2, 0), (2, 3, 4), (3, 4, 2)),
    ],
)
def test_transforms_invert_exactly(transform, shape, ours):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    there = transform.forward(x)
    assert there.shape == ours
    np.testing.assert_array_equal(transform.backward(there), x)


def test_transforms_refuse_axes_that_are_not_of_length_one():
    for transform, shape in ((POINTWISE, (4, 5, 3, 3)), (squeeze(0), (2, 3))):
        with pytest.raises(ValueError, match="not equal to one"):
            transform.forward(np.zeros(shape))


@pytest.mark.parametrize(
    ("torch_name", "ours", "stack"),
    [("a.{i}", "a", None), ("a", "a_{i}", None), ("a.{i}", "a_{i}", "i"), ("a", "a", "layer")],
)
def test_a_rule_with_placeholders_that_one_side_lacks_is_a_mistake(torch_name, ours, stack):
    with pytest.raises(ValueError, match="do not agree"):
        Rule(torch_name, ours, stack=stack)


def test_to_numpy_reads_what_needs_a_gradient():
    value = torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    np.testing.assert_array_equal(to_numpy(value), np.ones(2, np.float32))


def test_shape_votes_take_the_most_common_size():
    shapes = {"a.0.w": (4, 2), "a.1.w": (4, 3), "a.2.w": (9, 2), "b": (7,)}
    assert shape_votes(shapes, r"a\.\d\.w", 0) == 4
    assert shape_votes(shapes, r"a\.\d\.w", 1) == 2
    assert shape_votes(shapes, "b", 1, 5) == 5
    assert shape_votes(shapes, "c", 0) is None
