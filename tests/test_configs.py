"""Every shipped config at every size: shapes at full size, and one step when shrunk."""

import re
import runpy
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.small import shrink_model, shrunk
from ml_collections import ConfigDict

from bitgen import build
from bitgen.hub import model_directory, zoo
from bitgen.modes.benchmark import traced_sampler, traced_step
from bitgen.profiling import memory_estimate
from bitgen.profiling.roofline import random_values
from bitgen.runtime.mesh import make_mesh
from bitgen.samplers.images import image_keys, image_sampler, make_plan

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))
STEPPED = set()


def cases(slow_after=99):
    """Yields every config with every size; after `slow_after` sizes of a file, as slow tests."""
    for path in FILES:
        module = runpy.run_path(str(path))
        for i, size in enumerate(module.get("SIZES", [None])):
            marks = [pytest.mark.slow] if i >= slow_after else []
            name = f"{path.stem}:{size}" if size else path.stem
            arguments = [size] if size else []
            yield pytest.param(module["get_config"], arguments, id=name, marks=marks)


@pytest.mark.parametrize(("get_config", "arguments"), list(cases()))
def test_config(get_config, arguments):
    c = get_config(*arguments)
    assert isinstance(c, ConfigDict)
    if "model" in c:
        kind = c.train.task
        module, info = build.module_from_config(kind, c.model)
        assert jax.tree.leaves(build.param_shapes(module))
        assert info["kind"] == kind
        grid, size = module.grid, c.data.image_size
        if kind == "tokenizer":
            assert size == module.image_size
        elif c.data.source != "bits":
            assert size == 16 * grid[0]
    for field in ("tokenizer", "generator", "init_from"):
        if c[field].startswith("zoo:"):
            zoo.get(c[field].removeprefix("zoo:"))


@pytest.mark.parametrize(("get_config", "arguments"), list(cases(slow_after=1)))
def test_full_size_by_shape(get_config, arguments):
    """A training step with its discriminator, or sampling if the config trains nothing."""
    c = get_config(*arguments)
    if not c.train.task:
        generator, traced, _ = traced_sampler(c, make_mesh(devices=jax.devices()[:1]), 1)
        (images,) = traced.jaxpr.out_avals
        assert images.shape[0] == 1
        assert images.shape[1] == images.shape[2] == 16 * generator.grid[0]
        return
    task = memory_estimate.shapes_task(c)
    key = jax.random.key(0)
    before = jax.eval_shape(task.init, key)
    after, metrics = jax.eval_shape(
        lambda *args: task.step(*args, task.stage(c.train.steps)),
        *(before, task.frozen_shapes(), task.batch_shapes(), key),
    )
    described = [jax.tree.map(lambda a: (a.shape, a.dtype), state) for state in (before, after)]
    assert described[0] == described[1]
    assert metrics["loss"].shape == ()
    assert ("discriminator" in metrics) == (c.train.task == "tokenizer" and c.loss.gan_weight > 0)


@pytest.mark.slow
@pytest.mark.parametrize(("get_config", "arguments"), list(cases()))
def test_a_step_when_shrunk(get_config, arguments):
    c = get_config(*arguments)
    if not c.train.task:
        assert_samples(c)
        return
    shrink_model(c)
    if c.train.task == "generator":
        c.data.source = "bits"
    if (step := f"{c.model}{c.get('loss')}{c.train}") in STEPPED:
        return  # another size is the same model when shrunk
    STEPPED.add(step)
    mesh = make_mesh(**c.mesh, devices=jax.devices()[:2])
    traced, (state, frozen, batch) = traced_step(c, mesh)
    where = jax.tree.map(lambda s: s.sharding, (state, frozen))
    state, frozen = random_values((state, frozen), where)
    state = state.replace(opt=jax.tree.map(jnp.zeros_like, state.opt))
    started = jax.device_get(state.params)
    images = {name: np.full(s.shape, 7, s.dtype) for name, s in batch.items()}
    images = jax.device_put(images, jax.tree.map(lambda s: s.sharding, batch))
    state, metrics = traced.lower().compile()(state, frozen, images)
    assert np.isfinite(metrics["loss"])
    assert int(state.step) == 1
    assert any(
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(started), jax.tree.leaves(state.params), strict=True)
    )


def assert_samples(c):
    """Tiny models of the config's families draw images with its settings, in fewer steps."""
    modules = []
    for kind in ("generator", "tokenizer"):
        entry = zoo.get(c[kind])
        fields = shrunk(kind, entry.family, zoo.settings(entry))
        modules.append(build.make_module(kind, entry.family, fields))
    generator, tokenizer = modules
    tokenizer = tokenizer.clone(image_size=2 * generator.grid[0])
    model_directory.check_fit(
        *(model_directory.Model(module, {}, {}, "small") for module in (generator, tokenizer))
    )
    steps = "denoiser_steps" if "denoiser_steps" in c.sampler else "head_steps"
    c.sampler[steps] = 2
    mesh = make_mesh(**c.mesh)
    sampler = image_sampler(
        generator, tokenizer, make_plan(generator, c.sampler), mesh, c.sample.decode_batch
    )
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = [random_values(build.param_shapes(module), everywhere) for module in modules]
    images = sampler(*params, np.arange(8), image_keys(0, np.arange(8)))
    assert images.shape == (8, tokenizer.image_size, tokenizer.image_size, 3)
    assert np.asarray(images).std() > 0


def test_every_config_says_its_command():
    for path in FILES:
        assert re.search(rf"python -m bitgen\.main --config=configs/{path.name}", path.read_text())
