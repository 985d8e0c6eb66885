"""Every shipped config, at every size: it loads, and its model has shapes at full size."""

import runpy
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from bitgen import build, zoo

FILES = sorted((Path(__file__).parent.parent / "configs").glob("*.py"))


def cases():
    for path in FILES:
        module = runpy.run_path(str(path))
        sizes = module.get("SIZES") or module.get("TOKENIZERS") or {}
        if path.stem == "binary_ae_finetune":
            sizes = ("c64", "c128")
        for size in sizes or [None]:
            yield pytest.param(module["get_config"], size, id=f"{path.stem}:{size}")


@pytest.mark.parametrize(("get_config", "size"), list(cases()))
def test_config(get_config, size):
    c = get_config(size) if size else get_config()
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


def test_every_config_says_its_command():
    for path in FILES:
        text = path.read_text()
        assert "python -m bitgen.main" in text, path
        assert f"--config=configs/{path.name}" in text, path
