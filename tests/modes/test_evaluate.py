"""Mode `evaluate`: what it measures, that a killed run goes on, probes, metrics of pairs."""

import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from PIL import Image

from bitgen import build, config, data
from bitgen.errors import UserError
from bitgen.evaluation import feature_store
from bitgen.evaluation.features import make_extractor
from bitgen.evaluation.frechet import frechet_distance
from bitgen.evaluation.image_metrics import ms_ssim, psnr, ssim
from bitgen.evaluation.image_sets import pixels
from bitgen.evaluation.probe import accuracy_by_layer, fit_probe
from bitgen.hub import model_directory
from bitgen.images.decode import center_crop
from bitgen.images.output import write_png
from bitgen.modes import evaluate, reconstruct, sample
from bitgen.runtime.mesh import make_mesh
from bitgen.samplers import images as sampling
from bitgen.training.fid import data_pass, image_moments


@pytest.fixture(scope="module")
def digits():
    """All digits, uint8 [1797, 32, 32, 3]."""
    settings = data.default_config()
    settings.split = "all"
    batches = data.make_batches(settings, batch_size=600, seed=0, training=False)
    return np.concatenate([batch["image"] for batch in batches])


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Model directories of a tokenizer and a generator that nobody trained."""
    folder = tmp_path_factory.mktemp("models")
    for kind, family, fields in (
        ("tokenizer", "binary_ae", {**small.TOKENIZER, "image_size": 16, "multipliers": (1, 1, 1)}),
        ("generator", "bigr", small.GENERATOR),
    ):
        settings = build.model_config(kind, family, **fields)
        module, info = build.module_from_config(kind, settings)
        params = jax.tree_util.tree_map_with_path(random_leaf, build.param_shapes(module))
        model_directory.write(folder / kind, {**info, "origin": "a test"}, params)
    return folder


def random_leaf(path, shape):
    """Scales near one, the rest near zero; nothing is zero, as fresh modulations are."""
    name = jax.tree_util.keystr(path)
    noise = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape.shape)
    return np.asarray(0.3 * noise + ("scale" in name), np.float32)


def settings(models=None):
    c = config.base()
    c.evaluate.protocol = "random"
    c.evaluate.batch_size = 16
    c.evaluate.images = 48  # of the data
    c.data.threads = 2
    c.sampler.iterations = 1
    c.sampler.denoiser_steps = 2
    c.sampler.segments = 1
    c.sample.per_label = 3
    c.sample.batch_size = 8
    if models:
        c.tokenizer, c.generator = str(models / "tokenizer"), str(models / "generator")
    return c


def report(workdir):
    return json.loads((workdir / "evaluation.json").read_text())


def test_digits_are_nearer_to_digits_than_noise_is(digits, tmp_path, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (300, 32, 32, 3), np.uint8)
    np.savez_compressed(tmp_path / "reference.npz", arr_0=digits[::3])
    found = {}
    for name, images in (("digits", digits[1:900:3]), ("noise", noise)):
        np.savez(tmp_path / f"{name}.npz", arr_0=images)
        c = settings()
        c.evaluate.samples = str(tmp_path / f"{name}.npz")
        c.evaluate.reference = str(tmp_path / "reference.npz")
        c.evaluate.save_reference, c.evaluate.batch_size = "statistics.npz", 64
        evaluate.run(c, tmp_path)
        (found[name],) = report(tmp_path)["results"]
    near, far = found["digits"], found["noise"]
    for name in ("fid", "sfid", "kid"):
        assert near[name] < 0.1 * far[name]
    assert near["precision"] > 0.8 > 0.1 > far["precision"]
    assert near["recall"] > 0.8 > 0.1 > far["recall"]
    assert near["images"] == far["images"] == 300
    written = report(tmp_path)
    assert written["protocol"] == "random"
    assert len(written["weights"]) == 16
    assert written["counts"] == {"samples": 300, "reference": 599, "reference_features": 599}
    assert "inception_score" in capsys.readouterr().out

    # The statistics alone give the same FID; there is nothing to find precision with.
    c.evaluate.reference, c.evaluate.save_reference = str(tmp_path / "statistics.npz"), ""
    evaluate.run(c, tmp_path)
    (again,) = report(tmp_path)["results"]
    assert again["fid"] == pytest.approx(far["fid"], rel=1e-9)
    assert again["sfid"] == pytest.approx(far["sfid"], rel=1e-9)
    assert "precision" not in again


def test_folder_npz_and_data_are_one_reference(digits, tmp_path):
    for i, image in enumerate(digits[:40]):
        write_png(tmp_path / "images" / f"{i // 20}" / f"{i:04d}.png", image)
    np.savez(tmp_path / "images.npz", arr_0=digits[:40])
    np.savez(tmp_path / "samples.npz", arr_0=digits[100:140])
    rows = []
    for reference in (tmp_path / "images", tmp_path / "images.npz", ""):
        c = settings()
        c.evaluate.samples = str(tmp_path / "samples.npz")
        c.evaluate.reference = str(reference)
        c.evaluate.images = 0
        c.data.source, c.data.path = "folder", str(tmp_path / "images")
        evaluate.run(c, tmp_path)
        rows.append(report(tmp_path)["results"][0])
    assert rows[0] == rows[1] == rows[2]
    # Spread over the classes, not the first ones.
    c.evaluate.images, c.evaluate.manifold = 10, 5
    evaluate.run(c, tmp_path)
    assert report(tmp_path)["counts"]["reference"] == 10
    assert report(tmp_path)["counts"]["reference_features"] == 5


def test_a_generator_is_measured_as_its_samples_are(models, tmp_path):
    c = settings(models)
    c.sample.output = "samples.npz"
    sample.run(c, tmp_path)
    evaluate.run(c, tmp_path)
    direct = report(tmp_path)
    assert direct["counts"]["samples"] == 30
    assert direct["sampling"]["sampler"]["iterations"] == 1
    assert not (tmp_path / "evaluation.part").exists()
    c = settings()
    c.evaluate.samples, c.data.image_size = str(tmp_path / "samples.npz"), 16
    evaluate.run(c, tmp_path)
    (row,) = report(tmp_path)["results"]
    for name in ("fid", "sfid", "inception_score", "precision", "recall", "kid"):
        assert direct["results"][0][name] == pytest.approx(row[name], rel=1e-6), name


def sampler_of_noise(generator, tokenizer, plan, mesh, decode_batch=0):
    """In place of `image_sampler`: an image depends on its key, label and guidance alone."""

    def run(generator_params, tokenizer_params, labels, keys):
        seeds = np.asarray(jax.random.key_data(keys))
        return jnp.asarray(
            np.stack(
                [
                    np.random.default_rng([*seed, label]).integers(
                        0, round(60 * plan.guidance), (16, 16, 3), np.uint8
                    )
                    for seed, label in zip(seeds, labels, strict=True)
                ]
            )
        )

    return run


def test_a_killed_sweep_goes_on(models, tmp_path, monkeypatch):
    monkeypatch.setattr(feature_store, "_CHUNK", 5)
    monkeypatch.setattr(sampling, "image_sampler", sampler_of_noise)
    c = settings(models)
    c.evaluate.scales = "1,2.5"
    evaluate.run(c, tmp_path / "whole")
    whole = report(tmp_path / "whole")["results"]
    assert [row["guidance"] for row in whole] == [1, 2.5]
    assert whole[0]["fid"] != whole[1]["fid"]
    assert np.asarray(Image.open(tmp_path / "whole" / "guidance.png")).shape == (420, 640, 3)

    added, add = [], feature_store.FeatureStore.add

    def killed(self, features):
        if len(added) == 5:  # of 4 batches a scale: in the second scale
            raise KeyboardInterrupt
        added.append(self.next_index)
        add(self, features)

    with monkeypatch.context() as patch:
        patch.setattr(feature_store.FeatureStore, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(c, tmp_path / "killed")
    assert added == [0, 8, 16, 24, 0]
    assert not (tmp_path / "killed" / "evaluation.json").exists()

    def noted(self, features):
        added.append(self.next_index)
        add(self, features)

    monkeypatch.setattr(feature_store.FeatureStore, "add", noted)
    c.sample.batch_size = 16  # which changes no image
    evaluate.run(c, tmp_path / "killed")
    assert added[5:] == [5, 21]  # 8 images were done, whole chunks of 5 are kept
    again = report(tmp_path / "killed")["results"]
    for row, before in zip(again, whole, strict=True):
        assert row == pytest.approx(before, rel=1e-5)


def test_reconstruction(models, tmp_path):
    c = settings(models)
    c.evaluate.kind = "reconstruction"
    c.evaluate.images = 20
    evaluate.run(c, tmp_path)
    (row,) = report(tmp_path)["results"]
    assert row["images"] == 20
    assert {"psnr", "ssim", "rfid", "bits_entropy"} <= row.keys()
    assert row["bits_used"] == 1 - row["bits_dead"] / 4
    assert not {"ms_ssim", "lpips"} & row.keys()
    c.evaluate.protocol = "none"
    evaluate.run(c, tmp_path)
    (alone,) = report(tmp_path)["results"]
    assert alone == {k: v for k, v in row.items() if k != "rfid"}


def test_reconstruct_of_a_list_measures_as_evaluate_does(models, digits, tmp_path):
    for i in range(40):
        write_png(tmp_path / f"{i}.png", digits[i])
    (tmp_path / "val.txt").write_text("".join(f"{i}.png 32 32\n" for i in range(40)))
    c = settings(models)
    c.data.source, c.data.path = "list", str(tmp_path / "val.txt")
    c.evaluate.kind, c.evaluate.images = "reconstruction", 0
    evaluate.run(c, tmp_path)
    (row,) = report(tmp_path)["results"]
    c.reconstruct.update(protocol="random", split="all", batch_size=16, columns=5)
    reconstruct.run(c, tmp_path)
    found = json.loads((tmp_path / "reconstructions.json").read_text())
    assert row["images"] == 40
    assert found == {**row, "protocol": "random", "weights": report(tmp_path)["weights"]}
    picture = np.asarray(Image.open(tmp_path / "reconstructions.png"))
    assert picture.shape == (4 * 2 * 16, 5 * 16, 3)
    shown = Image.fromarray(digits[6])  # the fourth of 20, evenly spread over 40
    np.testing.assert_array_equal(picture[:16, 48:64], center_crop(shown, 16))
    below = picture[16:32, 48:64].astype(float) - picture[:16, 48:64]
    assert np.abs(below).mean() > 1  # what a tokenizer that nobody trained makes of it


def test_probe(models, tmp_path):
    c = settings(models)
    c.evaluate.kind = "probe"
    c.evaluate.images = 300
    evaluate.run(c, tmp_path)
    rows = report(tmp_path)["results"]
    assert [row["layer"] for row in rows] == [1, 2]
    assert all(row["accuracy"] > 0.2 for row in rows)  # ten classes, random features
    assert (tmp_path / "probe.png").is_file()


def test_a_probe_is_the_regression_of_scikit_learn(digits):
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    x, y = load_digits(return_X_y=True)
    x = x.astype(np.float32)
    l2 = 0.05
    predict = fit_probe(x[:1000], y[:1000], 10, l2=l2, steps=200)
    mean, deviation = x[:1000].mean(0), x[:1000].std(0) + 1e-6
    theirs = LogisticRegression(C=1 / (l2 * 1000), max_iter=1000, tol=1e-8)
    theirs.fit((x[:1000] - mean) / deviation, y[:1000])
    expected = theirs.predict((x[1000:] - mean) / deviation)
    assert np.mean(predict(x[1000:]) == expected) > 0.995
    layers = np.stack([x, np.zeros_like(x)], axis=1)  # a second layer that knows nothing
    sets = (layers[:1000], y[:1000]), (layers[1000:], y[1000:])
    found = accuracy_by_layer(*sets, 10, l2=l2, steps=200)
    assert found[0] > 0.85 > 0.2 > found[1]
    with pytest.raises(UserError, match="not 9 classes"):
        fit_probe(x, y, 9)


def test_psnr_and_ssim_of_pairs():
    import tensorflow as tf

    generator = np.random.default_rng(0)
    a = np.cumsum(generator.normal(size=(2, 176, 192, 3)), axis=1) * 10 + 128
    b = np.clip(a + 20 * generator.normal(size=a.shape), 0, 255).astype(np.uint8)
    a = np.clip(a, 0, 255).astype(np.uint8)
    found = jax.jit(lambda a, b: (psnr(a, b), ssim(a, b), ms_ssim(a, b)))(a, b)
    error = np.square(a.astype(float) - b).mean((1, 2, 3))
    np.testing.assert_allclose(found[0], 10 * np.log10(255**2 / error), rtol=1e-5)
    x, y = tf.constant(a), tf.constant(b)
    np.testing.assert_allclose(found[1], tf.image.ssim(x, y, 255), rtol=1e-4)
    np.testing.assert_allclose(found[2], tf.image.ssim_multiscale(x, y, 255), rtol=1e-4)
    assert (np.asarray(psnr(a, a)) > 70).all()
    with pytest.raises(UserError, match="176 pixels"):
        ms_ssim(a[:, :100], b[:, :100])
    with pytest.raises(UserError, match="one shape"):
        psnr(a, b[:, :5])


def test_fid_of_few_images_on_a_schedule(digits):
    extractor = make_extractor("random", "", make_mesh(), 64)
    settings = data.default_config()
    batches = pixels(data_pass(settings, extractor.rows, split="all"))
    reference = image_moments(batches, extractor, shares=True).gaussian()

    def fid(*batches):
        return frechet_distance(image_moments(batches, extractor).gaussian(), reference)

    near, far = fid(digits[:64], digits[64:100]), fid(255 - digits[:64], 255 - digits[64:100])
    assert near < 0.2 * far
    noise = np.random.default_rng(0).normal(size=(100, 32, 32, 3))
    worse = [near]
    for level in (20, 40, 80):  # the worse the images, the larger
        noisy = np.clip(digits[:100] + level * noise, 0, 255).astype(np.uint8)
        worse.append(fid(noisy[:64], noisy[64:]))
    assert worse == sorted(worse)
    assert worse[-1] > 5 * worse[0]
    assert fid(*np.array_split(digits, 29)) == pytest.approx(0, abs=1e-6)


def test_errors_say_what_to_do(digits, models, tmp_path):
    def fails(match, **changes):
        c = settings(models)
        c.evaluate.samples = str(tmp_path / "good.npz")
        c.evaluate.reference = str(tmp_path / "good.npz")
        for name, value in changes.items():
            c.evaluate[name] = str(value)
        with pytest.raises(UserError, match=match):
            evaluate.run(c, tmp_path)
        assert not (tmp_path / "evaluation.json").exists()

    np.savez(tmp_path / "good.npz", arr_0=digits[:10])
    np.savez(tmp_path / "float.npz", arr_0=digits[:10] / 255)
    np.savez(tmp_path / "other.npz", images=digits[:10])
    np.savez(tmp_path / "flat.npz", arr_0=digits[:10, 0])
    (tmp_path / "bad.npz").write_bytes(b"x" * 100)
    (tmp_path / "empty").mkdir()
    for i in range(20):
        write_png(tmp_path / "sizes" / f"{i}.png", digits[i, : 32 - i // 10])
    fails("no images .*none.npz", samples=tmp_path / "none.npz")
    fails("arr_0 is float64, not uint8", samples=tmp_path / "float.npz")
    fails(r"wanted arr_0, it holds \['images.npy'\]", samples=tmp_path / "other.npz")
    fails(r"\[10, 32, 3\], not images", samples=tmp_path / "flat.npz")
    fails("not an npz file, or it is damaged", samples=tmp_path / "bad.npz")
    fails("not an npz file, or it is damaged", reference=tmp_path / "bad.npz")
    fails("has no images", samples=tmp_path / "empty")
    fails(r"is 32x31 and the images before are 32x32", samples=tmp_path / "sizes")
    fails("there is no reference", reference=tmp_path / "none.npz")
    fails("unknown protocol", protocol="fid")
    fails("unknown kind of evaluation", kind="fid")
    fails("cannot read config.evaluate.scales='a'", samples="", scales="a")
    fails("is for a generator", scales="1,2")
