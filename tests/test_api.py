"""The Python API: the same numbers as the modes, whatever form pictures come in, clear errors."""

import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import small
from PIL import Image

import bitgen
from bitgen import UserError
from bitgen.hub import model_directory
from bitgen.images.pixels import from_uint8
from bitgen.runtime.mesh import make_mesh
from bitgen.samplers.images import image_keys, image_sampler

SETTINGS = {"iterations": 3, "denoiser_steps": 2, "segments": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    small.write_models(path)
    return path


@pytest.fixture(scope="module")
def model(folder):
    return bitgen.load(folder / "generator" / "model")


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), np.uint8)


def test_import_is_light():
    code = "import bitgen, sys; assert 'jax' not in sys.modules; bitgen.load; import jax"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tokenizer_is_found_by_its_digest(folder, model, tmp_path):
    assert model.tokenizer.path == str((folder / "tokenizer" / "model").resolve())
    generator = folder / "generator" / "model"
    loaded = model_directory.load(generator, "generator")
    alone = tmp_path / "elsewhere" / "model"
    model_directory.write(alone, {**loaded.info}, loaded.params)
    with pytest.raises(UserError, match="was not found nearby: give tokenizer=DIR"):
        bitgen.load(alone)
    given = bitgen.load(alone, folder / "tokenizer" / "model")
    assert given.tokenizer.info["digest"] == model.tokenizer.info["digest"]
    model_directory.write(alone, {**loaded.info, "origin": "a file"}, loaded.params)
    with pytest.raises(UserError, match="does not say which tokenizer"):
        bitgen.load(alone)
    with pytest.raises(UserError, match="is a tokenizer itself"):
        bitgen.load(folder / "tokenizer" / "model", generator)
    with pytest.raises(UserError, match="unknown dtype 'half'"):
        bitgen.load(generator, dtype="half")


def test_pictures_come_in_many_forms(model, images, tmp_path):
    bits = model.encode(images)
    assert bits.shape == (3, 4, 4, 4)
    assert bits.dtype == bool
    module, params = model.tokenizer.module, model.tokenizer.params
    wanted = module.apply({"params": params}, from_uint8(images), method="encode")
    np.testing.assert_array_equal(bits, wanted)
    Image.fromarray(images[1]).save(tmp_path / "one.png")
    forms = [
        [Image.fromarray(image) for image in images],
        [images[0], tmp_path / "one.png", Image.fromarray(images[2])],
        np.asarray(from_uint8(images)),
        images.repeat(2, 1).repeat(2, 2),  # twice the size, cropped to the same
    ]
    for form in forms:
        np.testing.assert_array_equal(model.encode(form, batch_size=2), bits)
    np.testing.assert_array_equal(model.encode(str(tmp_path / "one.png")), bits[1:2])


def test_images_go_out_in_three_forms(model, images):
    bits = model.encode(images)
    pixels, floats, pil = (model.decode(bits, to=to) for to in ("uint8", "float", "pil"))
    assert pixels.dtype == np.uint8
    assert floats.dtype == np.float32
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in pil]), pixels)
    inside = np.abs(floats) < 1
    np.testing.assert_allclose(from_uint8(pixels)[inside], floats[inside], atol=1 / 127)
    with pytest.raises(UserError, match="unknown format"):
        model.decode(bits, to="jpeg")


def test_a_shape_is_compiled_once(folder, images):
    model = bitgen.load(folder / "generator" / "model")
    for _ in range(2):
        model.decode(model.encode(images))
    assert model._encode._cache_size() == model._decode._cache_size() == 1


@pytest.mark.slow
def test_samples_are_those_of_the_sampler_on_any_mesh(model):
    labels = [3, 1, 4, 1, 5]
    found = model.sample(labels, seed=7, batch_size=2, **SETTINGS)
    assert len(np.unique(found, axis=0)) == 5
    sampler = image_sampler(
        model.generator.module, model.tokenizer.module, model.plan(**SETTINGS), make_mesh()
    )
    params = jax.device_get((model.generator.params, model.tokenizer.params))
    wanted = sampler(*params, np.array([*labels, 0, 0, 0]), image_keys(7, np.arange(8)))
    assert np.mean(np.abs(np.asarray(wanted)[:5].astype(int) - found) > 2) < 0.01
    pil = model.sample("3,1", seed=7, to="pil", **SETTINGS)
    np.testing.assert_array_equal(np.stack([np.asarray(image) for image in pil]), found[:2])


def test_a_mesh_shares_the_work(folder, model, images):
    spread = bitgen.load(folder / "generator" / "model", mesh=make_mesh())
    bits = spread.encode(images)
    np.testing.assert_array_equal(bits, model.encode(images))
    assert np.abs(spread.decode(bits).astype(int) - model.decode(bits)).max() <= 1


def test_steps_end_with_the_samples(model, tmp_path):
    wanted = model.sample("3,1", **SETTINGS)
    seen = np.zeros((2, 4, 4), bool)
    for images, drawn in model.steps("3,1", **SETTINGS):  # noqa: B007
        assert (drawn | ~seen).all()
        assert drawn.sum() > seen.sum()
        seen = drawn
    assert seen.all()
    np.testing.assert_array_equal(images, wanted)
    rare = list(model.steps("3,1", every=2, **SETTINGS))
    assert len(rare) == 2
    np.testing.assert_array_equal(rare[-1][0], wanted)
    with pytest.raises(UserError, match="every must be 1"):
        next(model.steps("3", every=0))


@pytest.mark.slow
def test_bitdance_is_replayed_in_its_order(tmp_path):
    generator, _ = small.write_models(tmp_path, "bitdance")
    model = bitgen.load(generator)
    settings = {"head_steps": 2, "guidance": 1.0, "segments": 1}
    *_, (images, _) = steps = list(model.steps([1, 2], **settings))
    assert [int(mask[0].sum()) for _, mask in steps] == [4, 8, 12, 16]
    assert steps[0][1][0, :2, :2].all()  # a group is a square patch
    np.testing.assert_array_equal(images, model.sample([1, 2], **settings))
    with pytest.raises(UserError, match="needs a bigr generator"):
        model.edit(images[0], "inpaint", box=(0, 0, 4, 4))


def test_edit_draws_where_it_is_told(model, images):
    common = {
        "seed": 2,
        "variants": 2,
        "iterations": 2,
        "sampler": {"denoiser_steps": 2, "segments": 1},
    }
    grid = np.zeros((4, 4), bool)
    grid[:2, :2] = True
    boxed = model.edit(images[0], "inpaint", box=(0, 0, 4, 4), label=3, **common)
    assert boxed.shape == (2, 8, 8, 3)
    for mask in (
        grid,
        grid.repeat(2, 0).repeat(2, 1),
        Image.fromarray(grid.repeat(2, 0).repeat(2, 1)),
    ):
        np.testing.assert_array_equal(
            model.edit(Image.fromarray(images[0]), mask=mask, label="3", **common), boxed
        )
    drawn = model.drawn(images[0], "outpaint", mask=~grid, label=3, **common)
    np.testing.assert_array_equal(drawn.images, boxed)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.sample("10"), "label 10 is out of range"),
        (lambda m: m.sample([]), "cannot read the label"),
        (lambda m: m.sample(1, speed=3), "unknown setting of the sampler 'speed'"),
        (lambda m: m.encode([]), "no picture"),
        (lambda m: m.encode("nowhere.png"), "cannot read the picture nowhere.png"),
        (lambda m: m.encode(np.zeros((8, 8), int)), r"a picture is uint8 \[H, W, 3\]"),
        (lambda m: m.encode(np.zeros((9, 9, 3), np.float32)), "must have the model's size"),
        (lambda m: m.encode(np.full((8, 8, 3), 200.0)), r"in \[-1, 1\]; give uint8"),
        (lambda m: m.decode(np.zeros((1, 4, 4, 5), bool)), r"decodes bool \[b, 4, 4, 4\]"),
        (lambda m: m.decode(np.zeros((1, 4, 4, 4))), "got float64"),
        (lambda m: m.decode((np.zeros((1, 4, 4, 4), bool),) * 2), "has 1 scales, got 2"),
        (lambda m: m.edit(kind="paint"), "unknown kind of edit 'paint'"),
        (lambda m: m.edit(kind="inpaint"), "inpaint needs image$"),
        (lambda m: m.edit(np.zeros((8, 8, 3), np.uint8)), "inpaint needs mask or box$"),
        (lambda m: m.edit(np.zeros((8, 8, 3), np.uint8), box=(0, 0, 4, 4), mood=1), "'mood'"),
        (lambda m: m.edit(np.zeros((8, 8, 3), np.uint8), box=(0, 0, 4, 4), variants="x"), "int"),
        (lambda m: m.edit(np.zeros((8, 8, 3), np.uint8), mask=np.zeros((8, 8), bool)), "nothing"),
        (lambda m: m.edit(np.zeros((8, 8, 3), np.uint8), mask=np.ones((4, 4), bool)), "every"),
        (lambda m: m.edit(np.zeros((8, 8, 3), np.uint8), mask=np.ones((5, 4), bool)), "is 4x5"),
    ],
)  # fmt: skip
def test_bad_input_says_what_to_do(model, call, words):
    with pytest.raises(UserError, match=words):
        call(model)


def test_a_tokenizer_alone_does_not_draw(folder, images):
    model = bitgen.load(folder / "tokenizer" / "model")
    assert model.decode(model.encode(images)).shape == (3, 8, 8, 3)
    for call in (
        lambda: model.sample("1"),
        lambda: model.edit(images[0]),
        lambda: model.class_names,
    ):
        with pytest.raises(UserError, match="load a generator"):
            call()
