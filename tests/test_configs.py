"""Every shipped config, at every size: a step when shrunk, and shapes at full size."""

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
    """Yields every config and size; those of a file after the first so many are slow tests."""
    for path in FILES:
        module = runpy.run_path(str(path))
        sizes = next((module[n] for n in ("SIZES", "TOKENIZERS", "FAMILIES") if n in module), {})
        if path.stem == "binary_ae_finetune":
            sizes = ("c64", "c128")
        for i, size in enumerate(sizes or [None]):
            marks = [pytest.mark.slow] if i >= slow_after else []
            name = f"{path.stem}:{size}" if size else path.stem
            yield pytest.param(module["get_config"], size, id=name, marks=marks)


def load(get_config, size):
    return get_config(size) if size else get_config()


@pytest.mark.parametrize(("get_config", "size"), list(cases()))
def test_config(get_config, size):
    c = load(get_config, size)
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


@pytest.mark.parametrize(("get_config", "size"), list(cases(slow_after=1)))
def test_full_size_by_shape(get_config, size):
    """The whole training step, its discriminator too; or sampling, if nothing is trained."""
    c = load(get_config, size)
    if not c.train.task:
        generator, traced, _ = traced_sampler(c, make_mesh(devices=jax.devices()[:1]), 1)
        (images,) = traced.jaxpr.out_avals
        assert images.shape[0] == 1
        assert images.shape[1] == images.shape[2] == 16 * generator.grid[0]
        return
    task = memory_estimate.shapes_task(c)
    before = jax.eval_shape(task.init, jax.random.key(0))
    after, metrics = jax.eval_shape(
        lambda *args: task.step(*args, task.stage(c.train.steps)),
        before,
        task.frozen_shapes(),
        task.batch_shapes(),
        jax.random.key(0),
    )
    assert jax.tree.structure(after) == jax.tree.structure(before)
    jax.tree.map(lambda a, b: (a.shape, a.dtype) == (b.shape, b.dtype) or 1 / 0, after, before)
    assert metrics["loss"].shape == ()
    assert ("discriminator" in metrics) == (c.train.task == "tokenizer" and c.loss.gan_weight > 0)


@pytest.mark.slow
@pytest.mark.parametrize(("get_config", "size"), list(cases()))
def test_a_step_when_shrunk(get_config, size):
    c = load(get_config, size)
    if not c.train.task:
        assert_samples(c)
        return
    shrink_model(c)
    if c.train.task == "generator":
        c.data.source = "bits"
    if (step := f"{c.model}{c.get('loss')}{c.train}") in STEPPED:
        return  # sizes that are the same model when shrunk
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
    """Two tiny models of the config's families draw images at its settings, in fewer steps."""
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
        text = path.read_text()
        assert "python -m bitgen.main" in text, path
        assert f"--config=configs/{path.name}" in text, path
