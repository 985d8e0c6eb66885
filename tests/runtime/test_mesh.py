"""The mesh: where arrays lie, and that a step is the same wherever they do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from bitgen import build, config
from bitgen.errors import UserError
from bitgen.nn import attention
from bitgen.runtime import sharding
from bitgen.runtime.mesh import AXES, make_mesh, to_device
from bitgen.runtime.sharding import RULES, leaf_spec, tree_shardings
from bitgen.training import state
from bitgen.training.generator_task import GeneratorTask
from bitgen.training.tokenizer_task import TokenizerTask

XXL = AbstractMesh((1, 4, 2), AXES)


@pytest.fixture(autouse=True)
def _everything_is_large(monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 32)


def bigr(**fields):
    c = small.generator("")
    c.data.source = "bits"
    c.model.update(fields)
    return GeneratorTask(c, files=False)


def bitdance():
    c = small.bitdance("")
    c.data.source = "bits"
    return GeneratorTask(c, files=False)


def tokenizer(family="binary_ae", **fields):
    c = small.tokenizer()
    c.model = build.model_config("tokenizer", family, **(fields or small.TOKENIZER))
    c.model.image_size = c.data.image_size = 16
    c.loss.gan_weight, c.loss.gan_start = 1.0, 0
    c.loss.discriminator_width, c.loss.discriminator_layers = 8, 1
    return TokenizerTask(c)


def accumulated():
    task = bigr()
    task.config.train.batch_size, task.config.train.accumulate = 16, 2
    return task


def random_batch(task):
    rng = np.random.default_rng(0)
    top = {"label": 10}
    return {
        name: rng.integers(0, top.get(name, 256), s.shape, s.dtype)
        for name, s in task.batch_shapes().items()
    }


def placed(task, mesh):
    """-> the state before the first step, on a mesh, and its shardings."""
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    shardings = tree_shardings(shapes, RULES[task.config.model.family], mesh)
    rng = np.random.default_rng(0)

    def value(path, shape):
        name = sharding.path_name(path)
        if "opt/" in name or "stats/" in name or shape.dtype != jnp.float32:
            return np.zeros(shape.shape, shape.dtype)
        normal = 0.05 * rng.standard_normal(shape.shape, np.float32)
        return 1 + normal if name.endswith("scale") else normal

    values = jax.tree_util.tree_map_with_path(value, shapes)
    return jax.device_put(values, shardings), shardings


def one_step(task, mesh):
    """-> the state and metrics after a step, and the shardings."""
    started, shardings = placed(task, mesh)
    program = state.step_program(task, shardings, mesh, jax.random.key(7))
    batch = to_device(random_batch(task), mesh)
    moved, metrics = program(started, {}, batch, task.stage(0))
    return jax.device_get(moved), jax.device_get(metrics), shardings


SLOW = pytest.mark.slow
FSDP, ALL = {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "tensor": 2}


@pytest.mark.parametrize(
    ("make", "meshes"),
    [
        (bigr, [ALL]),
        pytest.param(bigr, [{"data": 8}, FSDP], marks=SLOW),
        pytest.param(accumulated, [FSDP], marks=SLOW),
        pytest.param(bitdance, [FSDP, ALL], marks=SLOW),
        pytest.param(tokenizer, [FSDP, ALL], marks=SLOW),
    ],
)
def test_a_step_is_the_same_on_every_mesh(make, meshes):
    task = make()
    whole, numbers, _ = one_step(task, make_mesh(devices=jax.devices()[:1]))
    for sizes in meshes:
        ours, metrics, shardings = one_step(task, make_mesh(**sizes))
        assert metrics.keys() == numbers.keys()
        for name, value in numbers.items():
            np.testing.assert_allclose(metrics[name], value, rtol=2e-4, atol=1e-5, err_msg=name)
        # Adam's first moments are the gradients, a tenth of them; biases before a norm have none.
        moments = jax.tree_util.tree_leaves_with_path(ours.opt)
        for (path, a), b in zip(moments, jax.tree.leaves(whole.opt), strict=True):
            scale = max(np.abs(b).max(), 1e-6)
            np.testing.assert_allclose(a / scale, b / scale, atol=2e-3, err_msg=str(path))
        spread = [s.spec for s in jax.tree.leaves(shardings.params)]
        for axis in {"fsdp"} & sizes.keys():
            assert any(axis in spec for spec in spread), axis


def test_moments_and_averages_lie_where_their_parameters_do():
    for task in (bigr(), bitdance(), tokenizer()):
        shapes = jax.eval_shape(task.init, jax.random.key(0))
        rules = RULES[task.config.model.family]
        found = tree_shardings(shapes, rules, XXL)
        specs = [s.spec for s in jax.tree.leaves(found.params["model"])]
        assert [s.spec for s in jax.tree.leaves(found.ema)] == specs
        moments = jax.tree.leaves(found.opt["model"])
        assert [s.spec for s in moments if s.spec != P()] == [s for s in specs if s != P()] * 2


def test_specs_of_a_transformer():
    def spec(name, shape, family="bigr"):
        return leaf_spec(name, shape, RULES[family], XXL)

    # Heads and hidden features by tensor, the width by fsdp, layers by nothing.
    assert spec("ema/layers/attention/qkv/kernel", (48, 64, 3, 4, 16)) == P(
        None, "fsdp", None, "tensor"
    )
    assert spec("ema/layers/attention/out/kernel", (48, 4, 16, 64)) == P(
        None, "tensor", None, "fsdp"
    )
    assert spec("ema/layers/mlp/up/kernel", (48, 64, 96)) == P(None, "fsdp", "tensor")
    assert spec("ema/layers/mlp/down/kernel", (48, 96, 64)) == P(None, "tensor", "fsdp")
    assert spec("opt/model/0/mu/denoiser/blocks_0/mlp_in/kernel", (64, 64)) == P("fsdp", "tensor")
    gate_up = spec("ema/head/blocks_1/mlp/gate_up/kernel", (64, 2, 96), "bitdance")
    assert gate_up == P("fsdp", None, "tensor")
    # 48 layers divide by four, but are never split; what divides by nothing stays whole.
    assert spec("ema/layers/mlp_norm/scale", (48, 63)) == P()
    assert spec("ema/layers/attention/qkv/kernel", (48, 63, 3, 3, 17)) == P()
    assert spec("ema/decoder/stage_4/conv1/kernel", (8, 3, 3, 64, 6), "dcae") == P(
        None, None, None, "fsdp"
    )
    # Of 1536, a quarter is a multiple of 128, an eighth is none: then another axis.
    kernel = "ema/layers/attention/out/kernel", (48, 24, 64, 1536)
    assert spec(*kernel) == P(None, "tensor", None, "fsdp")
    eight = AbstractMesh((1, 8, 1), AXES)
    assert leaf_spec(*kernel, RULES["bigr"], eight) == P(None, None, "fsdp")
    assert spec("ema/norm/scale", (16,)) == P()  # small


@pytest.mark.parametrize("family", sorted(RULES))
def test_every_family_uses_every_axis(family):
    kind = "generator" if family in build.GENERATORS else "tokenizer"
    module = build.make_module(kind, family, {})
    shapes = build.param_shapes(module)
    found = tree_shardings(shapes, RULES[family], AbstractMesh((1, 2, 2), AXES))
    total = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    for axis, least in (("fsdp", 0.9), ("tensor", 0.5)):
        if axis == "tensor" and kind == "tokenizer":  # whole: see `sharding`
            continue
        split = sum(
            leaf.size
            for leaf, s in zip(jax.tree.leaves(shapes), jax.tree.leaves(found), strict=True)
            if axis in s.spec
        )
        assert split > least * total, axis
    assert RULES.keys() == build.TOKENIZERS.keys() | build.GENERATORS.keys()


def test_activations_are_split_by_batch(monkeypatch):
    """Without the constraint, the compiler splits features and holds the batch everywhere."""
    mesh = make_mesh(data=1, fsdp=8)
    task = bigr(width=64, heads=4)
    started, shardings = placed(task, mesh)
    seen, attend = [], attention.attend

    def watched(q, *args):
        jax.debug.inspect_array_sharding(q, callback=seen.append)
        return attend(q, *args)

    monkeypatch.setattr(attention, "attend", watched)
    program = state.step_program(task, shardings, mesh, jax.random.key(7))
    program.lower(started, {}, to_device(random_batch(task), mesh), False).compile()
    assert {s.shard_shape((8, 17, 4, 16)) for s in seen} == {(1, 17, 4, 16)}


def test_what_no_axis_divides_is_named(capsys):
    task = bigr(width=32)
    mesh = make_mesh(data=1, fsdp=3, devices=jax.devices()[:3])
    born, shardings = state.init_sharded(task.init, jax.random.key(0), RULES["bigr"], mesh)
    assert jax.tree.leaves(born)[0].sharding == jax.tree.leaves(shardings)[0]
    text = capsys.readouterr().err
    assert "have no axis that config.mesh.fsdp=3 divides" in text
    assert text.count("\n") == 1


def test_mesh_sizes():
    assert dict(make_mesh(fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    with pytest.raises(UserError, match=r"mesh data 3 x fsdp 1 x tensor 1 does not fit 8 devices"):
        make_mesh(data=3)
    assert config.base().mesh.to_dict() == {"data": -1, "fsdp": 1, "tensor": 1}
