"""`config.evaluate.kind=comparison`: several tokenizers on the same images."""

import json

import jax
import numpy as np
import pytest
from helpers import small
from PIL import Image

from bitgen import build
from bitgen.errors import UserError
from bitgen.evaluation import comparison
from bitgen.hub import model_directory
from bitgen.modes import evaluate
from bitgen.runtime.logging import format_table
from bitgen.training.metrics import RunLog


def test_latents_and_bits_are_one_table():
    text = format_table([{"name": "a", "bits": 4}, {"name": "b", "ratio": 2.5}])
    assert text.split() == ["name", "bits", "ratio", "a", "4", "b", "2.5"]


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
    """Two runs that differ in the bits of a token; the first has a validation curve."""
    paths = []
    for bits in (4, 6):
        workdir = tmp_path_factory.mktemp(f"bits{bits}")
        c = small.tokenizer()
        c.model.bits = bits
        module, info = build.module_from_config("tokenizer", c.model)
        params = jax.jit(lambda key, m=module: build.init_params(m, key))(jax.random.key(bits))
        model_directory.write(workdir / "model", info, params)
        paths.append(workdir)
    log = RunLog(paths[0])
    log.scalars(2, {"val_l1": 0.5})
    log.scalars(4, {"val_l1": 0.25})
    log.close()
    return paths


def test_table_page_and_curves(workdirs, tmp_path):
    c = small.tokenizer()
    c.evaluate.kind, c.evaluate.protocol, c.evaluate.split = "comparison", "none", "test"
    c.evaluate.tokenizers = ",".join(
        f"{name}={w}/model" for name, w in zip("ab", workdirs, strict=True)
    )
    c.reconstruct.columns = 8
    evaluate.run(c, tmp_path)
    report = json.loads((tmp_path / "evaluation.json").read_text())
    first, second = report["results"]
    assert (first["tokenizer"], first["code"], second["code"]) == ("a", "64 bits", "96 bits")
    # 8x8 pixels of 3 channels of 8 bits
    assert (first["bits_per_pixel"], first["ratio"], second["ratio"]) == (1.0, 24.0, 16.0)
    assert first["images"] == second["images"] == report["counts"]["images"] == 180
    for row in report["results"]:
        assert 0 < row["l1"] < 1
        assert 0 < row["psnr"] < 40
    assert first["l1"] != second["l1"]
    page = np.asarray(Image.open(tmp_path / "comparison.png"))
    assert page.shape[:2] == (3 * (96 + 22 + 4), 8 * 100 + 4)
    assert (tmp_path / "curves.png").is_file()  # of the one that has one
    assert comparison.validation_curve(f"{workdirs[0]}/model") == [(2, 0.5), (4, 0.25)]
    assert comparison.validation_curve(f"{workdirs[1]}/model") == []


def test_names():
    found = comparison.parse_tokenizers("runs/x/model, b=zoo:y,runs/z")
    assert found == {"x": "runs/x/model", "b": "zoo:y", "z": "runs/z"}
    with pytest.raises(UserError, match="two named 'x'"):
        comparison.parse_tokenizers("a/x/model,b/x/model")
    with pytest.raises(UserError, match="at least two"):
        comparison.parse_tokenizers("a")


def test_continuous_latents_are_counted_as_numbers():
    module = build.make_module("tokenizer", "conv_ae", {})
    found = comparison.code_size(module)
    assert (found["code"], found["ratio"], found["bits_per_pixel"]) == ("128 floats", 24.0, 4.0)
