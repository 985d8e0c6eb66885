"""`config.train.validate_every`: errors of the averaged model on what is not trained on."""

import numpy as np
import pytest
from helpers import small

from bitgen import data
from bitgen.errors import UserError
from bitgen.hub import model_directory
from bitgen.images.pixels import from_uint8
from bitgen.modes import train


def run(c, workdir, every=2):
    c.train.steps, c.train.validate_every = 4, every
    train.run(c, workdir)
    return [row for row in small.rows(workdir) if "val_examples" in row]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("tokenizer")
    return workdir, run(small.tokenizer(), workdir)


def test_a_tokenizer_is_measured_on_the_held_out_images(tokenizer):
    workdir, found = tokenizer
    assert [row["step"] for row in found] == [2, 4]
    model = model_directory.load(workdir / "model", "tokenizer")
    source = small.tokenizer().data
    source.split = "test"
    batches = data.make_batches(source, batch_size=50, seed=0, training=False)
    images = np.concatenate([batch["image"] for batch in batches])
    assert found[-1]["val_examples"] == len(images)
    variables = {"params": model.params}
    bits = model.module.apply(variables, from_uint8(images), method="encode")
    recon = np.clip(model.module.apply(variables, bits, method="decode"), -1, 1)
    # In pixels of [0, 1], as this family trains.
    np.testing.assert_allclose(
        found[-1]["val_l1"], np.abs(recon - from_uint8(images)).mean() / 2, rtol=1e-4
    )
    squares = np.square(np.round((recon + 1) * 127.5) - images).mean((1, 2, 3))
    np.testing.assert_allclose(
        found[-1]["val_psnr"], (10 * np.log10(255**2 / squares)).mean(), rtol=1e-4
    )


def test_a_generator_is_measured_by_its_loss(tokenizer, tmp_path):
    c = small.generator(str(tokenizer[0] / "model"))
    found = run(c, tmp_path)
    assert [row["step"] for row in found] == [2, 4]
    assert found[0]["val_examples"] == tokenizer[1][0]["val_examples"]
    assert 0 < found[1]["val_loss"] < found[0]["val_loss"] * 1.5


def test_without_held_out_examples_it_refuses(tmp_path):
    c = small.tokenizer()
    c.data.holdout = 0.0
    with pytest.raises(UserError, match="not trained on"):
        run(c, tmp_path)
