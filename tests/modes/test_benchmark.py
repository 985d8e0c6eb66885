"""Mode benchmark: what it writes and refuses, and its counts. Nothing here depends on a time."""

import importlib.util
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small

from bitgen import build
from bitgen.errors import UserError
from bitgen.hub import model_directory
from bitgen.modes import benchmark
from bitgen.profiling import compile_report
from bitgen.profiling.flops import count_bytes, count_flops
from bitgen.profiling.roofline import (
    Peaks,
    Program,
    Timing,
    compile_program,
    compiled_bytes,
    random_values,
    row,
    time_calls,
)
from bitgen.runtime import devices, sharding
from bitgen.runtime.mesh import make_mesh


def generator(tmp_path):
    """A tiny BiGR's settings, with its tokenizer's directory but no weights in it."""
    c = small.generator(tmp_path / "tokenizer")
    module, info = build.module_from_config("tokenizer", small.tokenizer().model)
    shapes = build.param_shapes(module)
    everywhere = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    model_directory.write(tmp_path / "tokenizer", info, random_values(shapes, everywhere))
    c.benchmark.repeats = 2
    c.sample.batch_size = c.tokenize.batch_size = 8
    return c


def report(workdir):
    return json.loads((workdir / "benchmark.json").read_text())


def test_memory_for_devices_that_are_not_here(tmp_path, capsys):
    c = small.generator("zoo:bigr_bae_d24")
    c.model.update({"bits": 24, "grid": (16, 16)})
    c.data.image_size = 256
    c.benchmark.update({"kind": "memory", "device": "TPU v5e", "devices": 64})
    c.train.batch_size = 64
    benchmark.run(c.lock(), tmp_path)
    found = report(tmp_path)["results"]["memory"]
    assert found["fits"]
    assert found["devices"] == 64
    assert found["bytes"]["frozen"] == pytest.approx(63.03e6 * 4, rel=0.01)
    assert {"parameters", "optimiser", "average", "batch", "step"} < found["bytes"].keys()
    text = capsys.readouterr().err
    assert "it fits 64 x TPU v5e with 16 GiB" in text
    assert "GiB a device" in text


def test_memory_says_what_to_change(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sharding, "SMALL", 32)
    c = small.tokenizer()
    parts = sum(benchmark.memory_estimate.estimate(c, 8).values())
    tiny = devices.Device(parts, 1.0, 1.0, ())
    monkeypatch.setitem(devices.DEVICES, "tiny", tiny)
    c.benchmark.update({"kind": "memory", "device": "tiny", "devices": 8})
    benchmark.run(c, tmp_path)
    text = capsys.readouterr().err
    assert "it does not fit 8 x tiny" in text
    assert "--config.mesh.data=1 --config.mesh.fsdp=8" in text
    assert report(tmp_path)["results"]["memory"]["advice"]["devices"] == 8


@pytest.mark.slow
def test_everything_is_measured(tmp_path, capsys):
    c = generator(tmp_path)
    benchmark.run(c, tmp_path)
    found = report(tmp_path)
    assert found["results"].keys() == {"memory", "tokenizer", "train", "sample"}
    rows = [line for part in found["results"].values() for line in part.get("rows", ())]
    assert [line["what"] for line in rows] == [
        "encode 8 images",
        "decode 8 images",
        "training step, 8 images",
        "sample 1 images",
        "sample 8 images",
    ]
    assert all(line["seconds"] > 0 and line["images_per_s"] > 0 for line in rows)
    assert all(line["gib_a_device"] > 0 for line in rows)
    assert found["results"]["train"]["peaks"]["flops"] > 0
    table = capsys.readouterr().out
    assert table.count("\n") == 1 + len(rows)
    assert "of_roofline" in table.splitlines()[0]


@pytest.mark.slow
def test_a_tokenizer_is_measured_in_bfloat16_with_its_discriminator(tmp_path, capsys):
    c = small.tokenizer()
    c.model.image_size = c.data.image_size = 16
    c.model.remat = True
    c.loss.gan_weight = 1.0
    c.loss.discriminator_width, c.loss.discriminator_layers = 8, 1
    c.sample.dtype = "bfloat16"
    c.tokenize.batch_size, c.benchmark.repeats = 8, 1
    benchmark.run(c, tmp_path)
    assert report(tmp_path)["results"].keys() == {"memory", "tokenizer", "train"}
    assert "skipped sample: the config has no generator" in capsys.readouterr().err


def test_compile_for_fake_devices(tmp_path, capsys):
    c = small.tokenizer()
    c.benchmark.update({"kind": "compile", "topology": "cpu:4"})
    c.mesh.update({"data": 1, "fsdp": 4})
    benchmark.run(c, tmp_path)
    (line,) = report(tmp_path)["results"]["compile"]["rows"]
    assert (line["what"], line["on"], line["compiles"]) == ("training step", "4 x cpu", "yes")
    assert line["gib_a_device"] >= 0
    assert line["kernels"] > 100
    assert line["products_gb"] > 0
    assert "all-reduce" in line["collectives"]
    assert "training step" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"benchmark.kind": "dance"}, r"unknown kind of benchmark 'dance', have \['compile'"),
        ({"benchmark.kind": "sample"}, "config.benchmark.kind=sample: the config has no generator"),
        ({"benchmark.kind": "memory", "benchmark.device": "abacus"}, "unknown device 'abacus'"),
        ({"benchmark.kind": "compile", "benchmark.topology": "cpu:99"}, "there are 8 CPU devices"),
        (
            {"benchmark.kind": "sample", "benchmark.batches": "1,x"},
            r"batches=1,x: numbers of images",
        ),
        ({"benchmark.kind": "train", "mesh.data": 3}, "does not fit 8 devices"),
        ({"benchmark.kind": "train", "train.batch_size": 12}, "choose a multiple of 8"),
    ],
)
def test_bad_settings_are_one_clear_error(change, message, tmp_path):
    c = small.tokenizer()
    c.update_from_flattened_dict(change)
    with pytest.raises(UserError, match=message):
        benchmark.run(c, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_released_model_is_not_fetched_to_be_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("BITGEN_CACHE", str(tmp_path / "cache"))
    c = small.generator("zoo:bigr_bae_d24")
    c.generator = "zoo:bigr_L_d24"
    assert benchmark.module_of(c, "generator").width == 1024
    assert benchmark.module_of(c, "tokenizer").bits == 24
    assert not (tmp_path / "cache").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is not None, reason="the TPU compiler is here"
)
def test_without_the_tpu_compiler_the_error_says_what_to_install():
    with pytest.raises(
        UserError, match=r"v5e:2x4 needs the TPU compiler.*pip install 'jax\[tpu\]'"
    ):
        compile_report.devices("v5e:2x4")


@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is not None, reason="the CUDA compiler may be here"
)
def test_without_the_cuda_compiler_the_error_says_what_to_install():
    with pytest.raises(UserError, match=r"h100:8 needs jax's CUDA.*pip install 'jax\[cuda13\]'"):
        compile_report.devices("h100:8")


def test_flops_and_bytes_of_a_program():
    def f(x, w):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]

    x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
    traced = jax.jit(f).trace(x, w)
    assert count_bytes(traced.jaxpr) == 5 * 4 * (8 * 16 + 16 * 16 + 8 * 16)
    mesh = make_mesh()
    spec = jax.sharding.PartitionSpec("data")
    mapped = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(spec, None), out_specs=spec))
    assert count_flops(mapped.trace(x, w).jaxpr) == count_flops(traced.jaxpr)
    program = compile_program(traced, 2)
    assert program.flops == count_flops(traced.jaxpr) / 2
    assert program.memory == compiled_bytes(program.run) >= x.nbytes + w.nbytes


def test_the_roofline_is_the_tighter_of_two_limits():
    program = Program(None, 1.0, flops=100.0, bytes=50.0, memory=2**30)
    assert program.bound(Peaks(flops=10.0, bandwidth=50.0)) == 10.0
    assert program.bound(Peaks(flops=100.0, bandwidth=10.0)) == 5.0
    line = row("x", 8, program, Timing(20.0, 0.125), Peaks(10.0, 50.0), model_flops=80.0)
    assert (line["limit"], line["of_roofline"], line["mfu"]) == ("matrices", "50.0%", "40.0%")
    assert (line["spread"], line["images_per_s"], line["gib_a_device"]) == ("12.5%", 0.4, 1.0)
    assert row("x", 8, program, Timing(20.0, 0.0), Peaks(100.0, 10.0))["limit"] == "memory"


def test_calls_are_repeated_after_one_that_is_not_timed():
    calls = []
    timing = time_calls(lambda: calls.append(1) or jnp.zeros(()), 3)
    assert timing.median > 0
    assert timing.spread >= 0
    assert len(calls) >= 5


def test_random_values_are_what_the_shapes_say():
    shapes = {
        "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 300, 200), jnp.float32)},
        "norm": {"var": jax.ShapeDtypeStruct((7,), jnp.float32)},
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    values = random_values(shapes, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    jax.tree.map(lambda v, s: (v.shape, v.dtype) == (s.shape, s.dtype) or 1 / 0, values, shapes)
    assert np.asarray(values["norm"]["var"]).min() > 0
    assert np.asarray(values["conv"]["kernel"]).std() == pytest.approx(0.02, rel=0.05)
    assert values["step"] == 0
