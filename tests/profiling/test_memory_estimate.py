"""What training takes on a device: counted from shapes, against arrays and against a compiler."""

import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from helpers import small

from bitgen.errors import UserError
from bitgen.profiling import memory_estimate
from bitgen.profiling.roofline import compiled_bytes
from bitgen.runtime.devices import GIB, by_kind, by_name, memory_of
from bitgen.runtime.mesh import abstract_mesh, make_mesh
from bitgen.runtime.sharding import RULES, bytes_per_device, tree_shardings

CONFIGS = Path(__file__).parents[2] / "configs"


def bigr(**fields):
    c = small.generator("")
    c.data.source = "bits"
    c.model.update({"width": 128, "mlp_multiple": 128, **fields})
    return c


def test_what_is_resident_is_what_arrays_take():
    c = bigr()
    mesh = make_mesh(data=2, fsdp=4)
    c.mesh.update({"data": 2, "fsdp": 4})
    task = memory_estimate.shapes_task(c)
    parts = memory_estimate.resident(task, mesh)
    assert parts == memory_estimate.resident(task, abstract_mesh(8, **c.mesh))
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    places = tree_shardings(shapes, RULES["bigr"], mesh)
    born = jax.jit(
        lambda: jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes), out_shardings=places
    )()

    def held(tree):
        return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))

    assert parts["parameters"] == held(born.params)
    assert parts["optimiser"] == held(born.opt)
    assert parts["average"] == held(born.ema)
    assert parts["batch"] == 4 * 4 * 1 + 4  # a row: packed bits [4, 4, 1] and a label
    assert parts["parameters"] < sum(x.nbytes for x in jax.tree.leaves(born.params)) / 3


def test_a_tokenizers_other_networks_are_counted():
    c = small.tokenizer()
    c.loss.gan_weight, c.loss.perceptual_weight = 1.0, 1.0
    c.model.image_size = c.data.image_size = 24
    parts = memory_estimate.resident(memory_estimate.shapes_task(c), abstract_mesh(8))
    assert parts["frozen"] == pytest.approx(14.7e6 * 4, rel=0.01)  # VGG16's convolutions
    assert parts["discriminator"] > 3 * 4 * 2.7e6  # PatchGAN with its moments
    c.loss.gan_weight, c.loss.perceptual_weight = 0.0, 0.0
    assert not {"frozen", "discriminator"} & set(
        memory_estimate.resident(memory_estimate.shapes_task(c), abstract_mesh(8))
    )


def test_xxl_on_eight_devices_takes_an_eighth_each():
    """By the compiler, which allocates nothing, and by the estimate."""
    c = runpy.run_path(str(CONFIGS / "bigr.py"))["get_config"]("XXL")
    c.mesh.update({"data": 1, "fsdp": 8})
    task, mesh = memory_estimate.shapes_task(c), make_mesh(**c.mesh)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    places = tree_shardings(shapes, RULES["bigr"], mesh)
    placed = jax.tree.map(
        lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, places
    )
    program = jax.jit(
        lambda s: jax.tree.map(lambda x: x + 1, s), out_shardings=places, donate_argnums=0
    )
    compiled = program.lower(placed).compile().memory_analysis()
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    assert whole > 22 * GIB
    assert compiled.argument_size_in_bytes == pytest.approx(whole / 8, rel=0.01)
    assert compiled.alias_size_in_bytes == compiled.argument_size_in_bytes
    parts = memory_estimate.resident(task, mesh)
    estimate = sum(parts[name] for name in ("parameters", "optimiser", "average"))
    assert estimate == pytest.approx(compiled.argument_size_in_bytes, rel=0.01)
    assert bytes_per_device(shapes, places) == pytest.approx(estimate, abs=8)  # the step counter


@pytest.mark.slow
def test_xxls_compiled_step_takes_an_eighth_of_the_state():
    from bitgen.modes.benchmark import traced_step

    c = runpy.run_path(str(CONFIGS / "bigr.py"))["get_config"]("XXL")
    c.data.source, c.train.batch_size, c.model.remat = "bits", 8, True
    c.mesh.update({"data": 1, "fsdp": 8})
    mesh = make_mesh(**c.mesh)
    traced, (state, _, _) = traced_step(c, mesh)
    compiled = traced.lower().compile()
    held = compiled.memory_analysis().argument_size_in_bytes  # and a batch, which is small
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    assert held == pytest.approx(whole / 8, rel=0.1)
    parts = memory_estimate.resident(memory_estimate.shapes_task(c), mesh)
    assert sum(parts.values()) == pytest.approx(held, rel=0.1)
    assert compiled_bytes(compiled) > sum(parts.values())


def traced(f, *shapes):
    return [
        jax.make_jaxpr(f)(*(jax.ShapeDtypeStruct((b, *s[1:]) if s[0] is None else s, jnp.float32)
                            for s in shapes))
        for b in (8, 16)
    ]  # fmt: skip


def test_liveness_of_a_chain():
    x, w, kilobyte = (None, 32), (32, 32), 8 * 32 * 4

    def chain(x, w):
        for _ in range(5):
            x = jnp.tanh(x @ w + 1)
        return x @ w

    # One product is read while the next is made; tanh is part of them.
    assert memory_estimate.step_bytes(*traced(chain, x, w), 1) == 2 * kilobyte

    def held(x, w):
        a = x @ w
        for _ in range(5):
            x = jnp.tanh(x @ w)
        return x @ w + a

    assert memory_estimate.step_bytes(*traced(held, x, w), 1) == 3 * kilobyte


def test_liveness_of_gradients_loops_and_remat():
    x, w, b, layer = (None, 32), (6, 32, 32), 8 * 32 * 4, 32 * 32 * 4

    def loss(body):
        return jax.grad(lambda w, x: jnp.sum(jax.lax.scan(body, x, w)[0]))

    def body(x, w):
        return jnp.tanh(jnp.tanh(x @ w) @ w), None

    kept = memory_estimate.step_bytes(*traced(loss(body), w, x), 1)
    assert kept >= 4 * 6 * b  # of each layer: two inputs, two outputs
    again = memory_estimate.step_bytes(
        *traced(loss(jax.checkpoint(body, prevent_cse=False)), w, x), 1
    )
    assert 6 * b <= again < kept - 2 * 6 * b
    # What does not grow with the batch is a matter of all devices that share the state: here the
    # gradient, of which all but the last is one of the outputs.
    assert memory_estimate.step_bytes(*traced(loss(body), w, x), 8) < kept
    assert layer > b


def test_settings_that_save_memory_do_so_in_the_estimate():
    def step(**changes):
        c = bigr()
        c.train.batch_size = 1024
        c.update_from_flattened_dict(changes)
        return memory_estimate.estimate(c, 8)

    usual = step()
    assert step(**{"model.remat": True})["step"] < 0.8 * usual["step"]
    assert step(**{"train.accumulate": 4})["step"] < 0.6 * usual["step"]


def test_advice_is_the_first_that_fits():
    c = bigr()
    c.train.batch_size = 1024
    usual = sum(memory_estimate.estimate(c, 8).values())
    assert memory_estimate.fits({"all": usual}, int(usual / 0.9) + 10)
    assert not memory_estimate.fits({"all": usual}, usual)
    limit = int(0.5 * usual)
    advice = memory_estimate.advise(c, 8, limit)
    assert advice is not None
    first = ("--config.mesh.data=1", "--config.mesh.fsdp=8", "--config.model.remat=True")
    assert advice.changes[:3] == first
    assert advice.devices == 8
    assert sum(advice.parts.values()) <= 0.9 * limit
    assert c.mesh.fsdp == 1
    assert memory_estimate.advise(c, 8, 1000) is None
    assert memory_estimate.format_parts({"step": 2 * GIB}) == "step 2: 2 GiB a device"


def test_a_zoo_tokenizer_is_not_fetched():
    c = runpy.run_path(str(CONFIGS / "bitdance.py"))["get_config"]("B_1x")
    task = memory_estimate.shapes_task(c)
    parts = memory_estimate.resident(task, abstract_mesh(8, data=1, fsdp=8))
    assert 8 * parts["frozen"] == pytest.approx(460.3e6 * 4, rel=0.01)


def test_devices():
    assert by_name("tpu V5E").memory == 16 * GIB
    with pytest.raises(UserError, match=r"unknown device 'TPU v9', have \['A100 40GB'"):
        by_name("TPU v9")
    for kind, name in (
        ("TPU v5 lite", "TPU v5e"),
        ("TPU v5", "TPU v5p"),
        ("NVIDIA A100-SXM4-80GB", "A100 80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L40S", "L40S"),
    ):
        assert by_kind(kind) is by_name(name)
    assert by_kind("cpu") is None
    assert memory_of(jax.devices()[0]) is None
