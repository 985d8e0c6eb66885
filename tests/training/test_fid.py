"""`config.train.fid_every`: what a run logs is what mode `evaluate` finds, also after a resume."""

import json

import numpy as np
import pytest
from helpers import small

from bitgen.errors import UserError
from bitgen.evaluation.frechet import frechet_distance
from bitgen.hub import model_directory
from bitgen.modes import evaluate, tokenize, train
from bitgen.runtime.mesh import make_mesh, replicated
from bitgen.samplers.images import image_sampler
from bitgen.training import fid
from bitgen.training.generator_task import GeneratorTask
from bitgen.training.metrics import RunLog

IMAGES = 20


def measured(c):
    c.train.steps, c.train.fid_every, c.train.fid_images = 4, 2, IMAGES
    c.evaluate.protocol, c.evaluate.batch_size = "random", 16
    c.sampler.iterations, c.sampler.denoiser_steps, c.sample.batch_size = 1, 2, 16
    return c


def rows(workdir, name):
    return [row for row in small.rows(workdir) if name in row]


def evaluated(c, workdir):
    """The one result of mode `evaluate` on what the run exported."""
    evaluate.run(c, workdir)
    (result,) = json.loads((workdir / "evaluation.json").read_text())["results"]
    return result


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """The workdir of a tokenizer run that measured rFID."""
    workdir = tmp_path_factory.mktemp("tokenizer")
    train.run(measured(small.tokenizer()), workdir)
    return workdir


def test_rfid_is_that_of_evaluate(tokenizer):
    found = rows(tokenizer, "rfid")
    assert [(row["step"], row["fid_images"]) for row in found] == [(2, IMAGES), (4, IMAGES)]
    assert found[0]["rfid"] != found[1]["rfid"]
    c = measured(small.tokenizer())
    c.evaluate.kind, c.evaluate.split, c.evaluate.images = "reconstruction", "train", IMAGES
    assert evaluated(c, tokenizer)["rfid"] == pytest.approx(found[1]["rfid"], rel=1e-4)


def test_fid_is_that_of_evaluate_and_goes_on_after_a_crash(tokenizer, tmp_path, monkeypatch):
    c = measured(small.generator(tokenizer / "model"))
    image_sampler.cache_clear()
    write = RunLog.scalars

    def crash(self, at, values):
        write(self, at, values)
        if at == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "scalars", crash)
        with pytest.raises(KeyboardInterrupt):
            train.run(c, tmp_path)
    (file,) = tmp_path.glob("fid_reference_*.npz")
    made = file.stat().st_mtime_ns
    train.run(c, tmp_path)
    assert file.stat().st_mtime_ns == made  # it was read
    found = rows(tmp_path, "fid")
    assert [row["step"] for row in found] == [2, 4]

    c.evaluate.split, c.sample.per_label = "train", IMAGES // 10
    result = evaluated(c, tmp_path)
    assert result["images"] == found[1]["fid_images"] == IMAGES
    assert image_sampler.cache_info().misses == 1
    assert result["fid"] == pytest.approx(found[1]["fid"], rel=1e-4)


def test_of_packed_bits_the_reference_is_decoded(tokenizer, tmp_path):
    t = small.tokenizer()
    t.tokenizer, t.tokenize.views = str(tokenizer / "model"), 1
    tokenize.run(t, tmp_path)
    c = measured(small.generator(t.tokenizer))
    c.data.source, c.data.path, c.evaluate.images = "bits", str(tmp_path / "bits"), IMAGES
    mesh = make_mesh()
    extractor = fid.check(c, mesh)
    assert extractor is not None
    reference = fid.find_reference(c, GeneratorTask(c), mesh, extractor, tmp_path)
    model = model_directory.load(t.tokenizer, "tokenizer", replicated(mesh))
    # The same images through the tokenizer, as its own task makes them.
    task = train.TokenizerTask(t)
    images = list(task.image_maker(mesh, extractor.rows, IMAGES)(model.params))
    assert sum(map(len, images)) == IMAGES
    again = fid.image_moments(images, extractor).gaussian()
    assert frechet_distance(again, reference) == pytest.approx(0, abs=1e-6)
    # A file of one's own takes its place.
    np.savez(tmp_path / "images.npz", arr_0=np.concatenate(images)[:10])
    c.evaluate.reference = str(tmp_path / "images.npz")
    other = fid.find_reference(c, GeneratorTask(c), mesh, extractor, tmp_path)
    assert not np.allclose(other.mean, reference.mean)

    c.tokenizer = ""
    with pytest.raises(UserError, match="no tokenizer given"):
        fid.start(c, GeneratorTask(c), mesh, extractor, tmp_path)


def test_errors_come_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setenv("BITGEN_CACHE", str(tmp_path / "cache"))

    def fails(match, **changes):
        c = measured(small.tokenizer())
        for name, value in changes.items():
            (c.train if name.startswith("fid") else c.evaluate)[name] = value
        with pytest.raises(UserError, match=match):
            train.run(c, tmp_path)
        assert not list(tmp_path.iterdir())

    fails(r"fid_every=2 measures FID: no Inception weights.*zoo:inception_pytorch", protocol="adm")
    fails("no Inception weights elsewhere.pth", protocol="adm", weights="elsewhere.pth")
    fails("unknown protocol of evaluation 'none'", protocol="none")
    fails("needs at least two images", fid_images=1)
