"""The notebooks: tidy as shipped, and run from top to bottom with small models and few steps."""

import ast
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import nbformat
import numpy as np
import pytest
from helpers import small
from nbclient import NotebookClient
from PIL import Image

from bitgen import build
from bitgen.hub import model_directory, zoo

ROOT = Path(__file__).parent.parent
NAMES = ("sample_tpu", "edit", "train")


def read(name) -> Any:
    return nbformat.read(ROOT / "colab" / f"{name}.ipynb", as_version=4)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def parameters_of(notebook):
    """-> the position of the cell of parameters, and their defaults."""
    (found,) = (
        i for i, c in enumerate(notebook.cells) if "parameters" in c.metadata.get("tags", ())
    )
    statements = ast.parse(notebook.cells[found].source).body
    assert all(isinstance(s, ast.Assign) for s in statements)
    return found, {s.targets[0].id: ast.literal_eval(s.value) for s in statements}


# ---- As shipped ----


def test_every_notebook_is_here():
    assert sorted(path.stem for path in (ROOT / "colab").glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_notebook_is_tidy(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.cells[0].cell_type == "markdown"
    assert f"colab/{name}.ipynb" in notebook.cells[0].source
    for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
        if cell.cell_type != "code":
            continue
        assert cell.outputs == []
        assert cell.execution_count is None
        assert before.cell_type == "markdown", "a line above each cell says what it does"
        lines = cell.source.splitlines()
        assert len(lines) <= 12, cell.source
        assert max(map(len, lines)) <= 100, cell.source
        # What IPython adds to the language.
        plain = re.sub(r"^(\s*)[%!].*$", r"\1pass", cell.source, flags=re.MULTILINE)
        ast.parse(plain)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_notebook_names_exists(name):
    notebook = read(name)
    text = "\n".join(cell.source for cell in code_of(notebook))
    for config in re.findall(r"configs/\w+\.py", text):
        assert (ROOT / config).is_file(), config
    for model in re.findall(r"\b(?:bigr|bitdance)_\w+_\w+", text):
        if model.upper() != model and not model.startswith(("bitgen_", "digits_")):
            zoo.get(model)
    _, defaults = parameters_of(notebook)
    if "LABELS" in defaults:
        assert len(labels(defaults["LABELS"])) == 4
    if "BETWEEN" in defaults:
        assert len(labels(f"{defaults['LABEL']},{defaults['DRAWN']},{defaults['BETWEEN']}")) == 4


def labels(text):
    from bitgen.labels import imagenet_names, parse_labels

    return parse_labels(text, 1000, imagenet_names())


# ---- Run ----


def execute(name, folder, monkeypatch, **parameters):
    """Runs a notebook in `folder`, its parameters changed; returns its code cells with outputs."""
    notebook = read(name)
    at, defaults = parameters_of(notebook)
    assert set(parameters) <= set(defaults)
    source = "\n".join(f"{key} = {value!r}" for key, value in {**defaults, **parameters}.items())
    notebook.cells[at].source = source
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
    client = NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute()
    return code_of(notebook)


def pictures(cells):
    """-> how many PNG pictures the outputs of each cell hold."""
    return [sum("image/png" in o.get("data", {}) for o in cell.outputs) for cell in cells]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with a small BiGR, a small BitDance and the tokenizer of both."""
    folder = tmp_path_factory.mktemp("models")
    rng = np.random.default_rng(0)

    def write(name, kind, family, fields, **info):
        shapes = build.param_shapes(build.make_module(kind, family, fields))
        params = jax.tree.map(
            lambda leaf: jnp.asarray(rng.normal(0, 0.2, leaf.shape), leaf.dtype), shapes
        )
        info = {"kind": kind, "family": family, "hparams": fields, **info}
        model_directory.write(folder / name, info, params)

    write("tokenizer", "tokenizer", "binary_ae", small.TOKENIZER)
    origin = {"tokenizer": model_directory.identity(folder / "tokenizer")}
    names = [f"class {i}" for i in range(10)]
    for family, fields in (("bigr", small.GENERATOR), ("bitdance", small.BITDANCE)):
        write(family, "generator", family, fields, origin=origin, class_names=names)
    return folder


@pytest.mark.slow
def test_sample_tpu(models, tmp_path, monkeypatch):
    cells = execute(
        "sample_tpu",
        tmp_path,
        monkeypatch,
        LABELS="class 3, 7",
        PER_LABEL=2,
        BIGR=str(models / "bigr"),
        BITDANCE=str(models / "bitdance"),
    )
    # BiGR, its guidance, its stages; BitDance twice.
    assert pictures(cells)[-5:] == [1, 1, 1, 1, 1]
    assert len(list(tmp_path.glob("sample_*.png"))) == 4


@pytest.mark.slow
def test_edit(models, tmp_path, monkeypatch):
    Image.effect_noise((20, 16), 64).save(tmp_path / "mine.png")
    cells = execute(
        "edit",
        tmp_path,
        monkeypatch,
        PICTURE="mine.png",
        MODEL=str(models / "bigr"),
        LABEL="5",
        BETWEEN="class 2, 8",
        VARIANTS=2,
    )
    # The picture, its bits, the box; then every kind, and a mask.
    assert pictures(cells)[-9:] == [1] * 9


@pytest.mark.slow
def test_train_on_digits(tmp_path, monkeypatch):
    cells = execute(
        "train",
        ROOT,
        monkeypatch,
        OUT=str(tmp_path),
        TOKENIZER_STEPS=2,
        GENERATOR_STEPS=2,
        PER_CLASS=1,
        MORE=[
            "--config.model.width=32",
            "--config.train.preview_images=8",
            "--config.sampler.iterations=4",
            "--config.sampler.denoiser_steps=4",
        ],
    )
    shown = pictures(cells)
    assert shown[-2:] == [1, 1], "a row for each class, and the curves"
    assert sum(shown) == 3, "and reconstructions"
    assert "(10, 32, 32, 3)" in cells[-3].outputs[-1]["data"]["text/plain"]
