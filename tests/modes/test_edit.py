"""Mode `edit`: what is drawn and what stays, whatever the weights, and every bad input."""

import dataclasses
import json
import runpy
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import small
from PIL import Image

from bitgen import build, config
from bitgen.errors import UserError
from bitgen.hub import model_directory
from bitgen.images import editing, grids, inputs
from bitgen.images.decode import center_crop
from bitgen.images.pixels import from_uint8
from bitgen.modes import edit
from bitgen.runtime.mesh import make_mesh, replicated
from bitgen.samplers import edits, redraw
from bitgen.samplers.images import image_keys, image_sampler
from bitgen.samplers.masked import sample_bits

TOKENIZER = {**small.TOKENIZER, "image_size": 16}
GENERATOR = {**small.GENERATOR, "layers": 1, "grid": (8, 8), "num_classes": 5}
WIDTH, HEIGHT = 40, 32  # of the picture: the centre crop to 16 halves it and takes x 4 to 36
BOX = "12,8,24,20"  # tokens (2..5, 2..5) of the 8x8 grid
SEED = 3


def nowhere_zero(module):
    """Parameters such that labels, steps and neighbours matter."""
    rng = np.random.default_rng(0)

    def values(leaf):
        scale = 1.5 / max(leaf.shape[-1], 2) ** 0.5
        return jnp.asarray(rng.normal(0, scale, leaf.shape), leaf.dtype)

    return jax.tree.map(values, build.param_shapes(module))


def build_models(side=8):
    """A generator and a tokenizer with side x side tokens."""
    models = []
    for kind, family, fields in (
        ("generator", "bigr", {**GENERATOR, "grid": (side, side)}),
        ("tokenizer", "binary_ae", {**TOKENIZER, "image_size": 2 * side}),
    ):
        module = build.make_module(kind, family, fields)
        info = {"kind": kind, "family": family, "hparams": fields, "origin": "test"}
        if kind == "generator":
            info["class_names"] = ["one", "two", "three, trio", "four", "five"]
        models.append(model_directory.Model(module, nowhere_zero(module), info, kind))
    return models


@pytest.fixture(scope="module")
def loaded():
    return build_models()


@pytest.fixture(scope="module")
def models(loaded, tmp_path_factory):
    """A folder with the model directories `generator` and `tokenizer`."""
    path = tmp_path_factory.mktemp("models")
    for model in loaded:
        model_directory.write(path / model.path, model.info, model.params)
    return path


@pytest.fixture
def files(tmp_path):
    """A folder with a picture and its mask in many formats."""
    rng = np.random.default_rng(0)
    low = Image.fromarray(rng.integers(0, 256, (4, 5, 3)).astype(np.uint8))
    picture = low.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
    picture.save(tmp_path / "picture.png")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[8:20, 12:24] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def settings(models, files=None, **fields) -> Any:
    """Settings of an edit with these models; file names are below `files`."""
    c: Any = config.base()
    c.seed = SEED
    c.tokenizer, c.generator = str(models / "tokenizer"), str(models / "generator")
    c.sampler.denoiser_steps, c.sampler.segments = 2, 1
    c.edit.update({"iterations": 4, **fields})
    for name in ("image", "mask"):
        if c.edit[name]:
            c.edit[name] = str(files / c.edit[name])
    return c.lock()


def mask_of(c, generator, tokenizer) -> Any:
    """The tokens that the mode would draw, [h, w]."""
    source = edits.read_input(c.edit, edits.KINDS[c.edit.kind])
    if source.area is None:
        return None
    size = tokenizer.module.image_size
    return edits.token_mask(c.edit.kind, source.area, size, generator.module.grid)


def work_of(c, loaded):
    """What the mode would draw from random bits, and the sampler's settings."""
    module = loaded[0].module
    known = np.random.default_rng(0).random((*module.grid, module.bits)) < 0.5
    labels = edits.read_labels(c.edit, loaded[0])
    work, _ = edits.plan_edit(c, loaded[0], labels, known, mask_of(c, *loaded))
    return work, edits.make_edit_plan(c, guided=bool(labels))


def drawn(c, loaded, devices=1, batch_size=32):
    work, plan = work_of(c, loaded)
    mesh = make_mesh(devices=jax.devices()[:devices])
    generator, tokenizer = (
        dataclasses.replace(model, params=jax.device_put(model.params, replicated(mesh)))
        for model in loaded
    )
    return redraw.redraw_images(
        generator, tokenizer, work, plan, mesh, seed=c.seed, batch_size=batch_size
    )


def read(path):
    return np.asarray(Image.open(path))


AREA_KINDS = [
    {"kind": "inpaint", "mask": "mask.png"},
    {"kind": "inpaint", "mask": "mask.png", "label": "2"},
    {"kind": "outpaint", "mask": "mask.png"},
    {"kind": "edit", "mask": "mask.png", "label": "2"},
]


@pytest.mark.parametrize("fields", AREA_KINDS)
def test_known_tokens_stay_and_exactly_the_masked_are_drawn(models, loaded, files, fields):
    c = settings(models, files, image="picture.png", **fields)
    work, plan = work_of(c, loaded)
    ((mask,),) = work.rounds
    # Nearest neighbour: cell i is read at pixel 2i of the crop, 4i of the picture, 4 to the right.
    inside = np.zeros((8, 8), bool)
    inside[2:5, 2:5] = True
    np.testing.assert_array_equal(mask, ~inside if c.edit.kind == "outpaint" else inside)
    draw = redraw.make_redraw(loaded[0].module, plan, make_mesh())
    classes, keys = work.classes[work.indices], image_keys(SEED, work.indices)
    known = np.repeat(work.known[None], 8, axis=0)
    bits = np.asarray(draw(loaded[0].params, classes, known, keys, mask))
    np.testing.assert_array_equal(bits[:, ~mask], known[:, ~mask])
    # All of the masked are drawn: nothing of what was under the mask is left, or read.
    other = draw(loaded[0].params, classes, known ^ mask[..., None], keys, mask)
    np.testing.assert_array_equal(other, bits)
    assert (bits[0] != bits[1]).any()


def test_box_is_the_mask_of_its_rectangle(models, loaded, files):
    by_mask = settings(models, files, image="picture.png", mask="mask.png")
    by_box = settings(models, files, image="picture.png", box=BOX)
    np.testing.assert_array_equal(mask_of(by_mask, *loaded), mask_of(by_box, *loaded))


def test_outpaint_draws_the_complement_of_inpaint(models, loaded, files):
    common = {"image": "picture.png", "mask": "mask.png"}
    inside, outside = (
        mask_of(settings(models, files, kind=kind, **common), *loaded)
        for kind in ("inpaint", "outpaint")
    )
    np.testing.assert_array_equal(inside, ~outside)


def test_guidance_needs_a_class(models, loaded, files):
    common = {"image": "picture.png", "mask": "mask.png", "variants": 2}
    free = settings(models, files, **common)
    assert edits.make_edit_plan(free, guided=False).guidance == 1
    steered = settings(models, files, label="1", **common)
    assert edits.make_edit_plan(steered, guided=True).guidance == 2.5
    assert (
        edits.make_edit_plan(settings(models, files, guidance=4.0, **common), guided=True).guidance
        == 4
    )
    bits = [drawn(c, loaded)[0] for c in (free, steered)]
    assert (bits[0] != bits[1]).any()


def test_defaults_are_those_of_the_scripts():
    c: Any = config.base()
    for kind, iterations, guidance, order in (
        ("inpaint", 25, 2.5, "linear"),
        ("outpaint", 25, 2.5, "linear"),
        ("edit", 25, 2.5, "linear"),
        ("interpolate", 20, 2.5, "cosine"),
        ("enrich", 20, 10.0, "linear"),
    ):
        c.edit.kind = kind
        plan = edits.make_edit_plan(c, guided=True)
        assert (plan.iterations, plan.guidance, plan.order) == (iterations, guidance, order)
        assert (plan.gumbel, plan.denoiser_steps) == (0, 100)
    ratios = redraw.mixing_ratios(0)
    assert len(ratios) == 27
    assert (np.diff(ratios) > 0).all()
    assert list(redraw.mixing_ratios(3)) == [0, 0.5, 1]


def test_interpolation_starts_and_ends_at_plain_samples(models, loaded):
    c = settings(models, kind="interpolate", labels="1,4", steps=5, variants=2, iterations=3)
    work, plan = work_of(c, loaded)
    np.testing.assert_array_equal(work.indices, [0] * 5 + [1] * 5)
    bits, images = (made.reshape(2, 5, *made.shape[2:]) for made in drawn(c, loaded))
    generator, tokenizer = loaded
    labels, keys = np.array([1, 1, 4, 4] * 2), image_keys(SEED, np.array([0, 1] * 4))
    plain = sample_bits(generator.module, generator.params, jnp.asarray(labels[:4]), keys[:4], plan)
    np.testing.assert_array_equal(bits[:, 0], plain[:2])
    np.testing.assert_array_equal(bits[:, -1], plain[2:])
    # And so are the images, but for the last bit of float32.
    sampler = image_sampler(generator.module, tokenizer.module, plan, make_mesh())
    shown = np.asarray(sampler(generator.params, tokenizer.params, labels, keys)).astype(int)
    np.testing.assert_allclose(images[:, 0], shown[:2], atol=1)
    np.testing.assert_allclose(images[:, -1], shown[2:4], atol=1)
    assert (bits[0, 0] != bits[0, -1]).any()
    assert (bits[0] != bits[1]).any()


@pytest.mark.parametrize("grid", [(8, 8), (5, 5), (4, 7), (1, 1), (1, 3)])
@pytest.mark.parametrize("side", [2, 3, 4])
def test_block_masks_hold_each_token_once(grid, side):
    masks = redraw.block_masks(grid, side, np.random.default_rng(0))
    np.testing.assert_array_equal(np.sum(masks, axis=0), np.ones(grid))
    assert all(mask.any() for mask in masks)
    if side == 2 and grid == (8, 8):
        blocks = [mask.reshape(4, 2, 4, 2).sum((1, 3)) for mask in masks]
        np.testing.assert_array_equal(blocks, np.ones((4, 4, 4)))
        # Each pass takes the same place of all blocks, and the order is shuffled.
        orders = [
            tuple(int(np.argmax(m[:2, :2])) for m in redraw.block_masks(grid, 2, rng))
            for rng in map(np.random.default_rng, range(8))
        ]
        assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
        assert len(set(orders)) > 1


def test_enrich_draws_every_token_once_a_round(models, loaded, files):
    c = settings(models, files, kind="enrich", image="picture.png", rounds=2, variants=2)
    work, plan = work_of(c, loaded)
    assert plan.guidance == 1
    for masks in work.rounds:
        np.testing.assert_array_equal(np.sum(masks, axis=0), np.ones((8, 8)))
    bits, _ = drawn(c, loaded)
    assert bits.shape == (2, 2, 8, 8, 4)
    # One pass at a time, by hand: only its tokens change, and the whole comes out the same.
    draw = redraw.make_redraw(loaded[0].module, plan, make_mesh())
    keys, classes = image_keys(SEED, np.arange(8)), jnp.tile(work.classes[:1], (8, 1))
    state, passes = np.repeat(work.known[None], 8, axis=0), 0
    for masks, expected in zip(work.rounds, bits.swapaxes(0, 1), strict=True):
        for mask in masks:
            folded = jax.vmap(jax.random.fold_in, (0, None))(keys, passes)
            new = np.asarray(draw(loaded[0].params, classes, state, folded, mask))
            np.testing.assert_array_equal(new[:, ~mask], state[:, ~mask])
            assert (new != state).any()
            state, passes = new, passes + 1
        np.testing.assert_array_equal(state[:2], expected)


def test_enrich_reads_the_reduced_picture(models, files):
    picture = inputs.read_picture(str(files / "picture.png"))
    view = editing.reduced_view(picture, 16, 4)
    small = center_crop(picture, 4).astype(np.float32)
    # Bilinear enlargement by 4: pixel 1 lies at 1.5 / 4 - 0.5 of the first, held at the edge.
    np.testing.assert_array_equal(view[0, 0], small[0, 0])
    x = 6.5 / 4 - 0.5
    expected = small[1, 1] * (2 - x) + small[1, 2] * (x - 1)
    y = 6.5 / 4 - 0.5
    below = small[2, 1] * (2 - x) + small[2, 2] * (x - 1)
    np.testing.assert_allclose(view[6, 6], expected * (2 - y) + below * (y - 1), atol=1)


@pytest.mark.parametrize(
    ("fields", "devices"),
    [
        ({"kind": "inpaint", "image": "picture.png", "box": BOX, "variants": 5}, 8),
        ({"kind": "interpolate", "labels": "0,3", "steps": 5}, 2),
        ({"kind": "enrich", "image": "picture.png", "rounds": 1, "variants": 5}, 2),
    ],
)
def test_images_depend_on_no_device_count_and_no_batch_size(models, loaded, files, fields, devices):
    c = settings(models, files, **fields)
    bits, images = drawn(c, loaded, devices=1, batch_size=32)
    other_bits, other_images = drawn(c, loaded, devices=devices, batch_size=2)
    np.testing.assert_array_equal(other_bits, bits)
    np.testing.assert_allclose(other_images.astype(int), images, atol=1)


def test_odd_grids_and_more_iterations_than_tokens(models, files):
    loaded = build_models(side=5)
    c = settings(models, files, image="picture.png", box="4,0,20,16", variants=1, iterations=30)
    work, _ = work_of(c, loaded)
    ((mask,),) = work.rounds
    assert mask.sum() == 9
    bits, images = drawn(c, loaded)
    assert images.shape == (1, 1, 10, 10, 3)
    np.testing.assert_array_equal(bits[0, 0][~mask], work.known[~mask])


# ---- The mode as a whole ----


@pytest.fixture
def noise(monkeypatch):
    """Instead of drawing, gives noise; the value holds what was to be drawn."""
    calls = []

    def draw(generator, tokenizer, work, plan, mesh, **options):
        calls.append({"work": work, "plan": plan, **options})
        shape = (len(work.indices), len(work.rounds), 16, 16, 3)
        return None, np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)

    monkeypatch.setattr(redraw, "redraw_images", draw)
    return calls


@pytest.mark.parametrize(
    ("fields", "count", "tokens"),
    [
        ({"kind": "inpaint", "image": "picture.png", "mask": "mask.png"}, 8, 9),
        ({"kind": "outpaint", "image": "picture.png", "box": BOX, "variants": 2}, 2, 55),
        ({"kind": "edit", "image": "picture.png", "box": BOX, "label": "4"}, 8, 9),
        ({"kind": "interpolate", "labels": "0,3"}, 27, 64),
        ({"kind": "enrich", "image": "picture.png", "rounds": 3, "variants": 2}, 6, 192),
    ],
)
def test_outputs(models, files, noise, fields, count, tokens):
    workdir = files / "run"
    workdir.mkdir()
    for stale in ("edit_99.png", "blended_99.png"):
        (workdir / stale).write_bytes(b"old")
    edit.run(settings(models, files, **fields), workdir)
    report = json.loads((workdir / "edit.json").read_text())
    assert [name["file"] for name in report["images"]] == [
        f"edit_{i:02d}.png" for i in range(count)
    ]
    written = {path.name for path in workdir.iterdir()}
    assert written == {name["file"] for name in report["images"]} | {"edit.png", "edit.json"}
    for name in report["images"]:
        assert read(workdir / name["file"]).shape == (16, 16, 3)
    assert (report["tokens"], report["tokens_drawn"]) == (64, tokens)
    assert report["edit"]["kind"] == fields["kind"]
    assert report["seed"] == SEED
    assert report["plan"]["iterations"] == 4
    assert report["generator"]["digest"] == model_directory.identity(models / "generator")["digest"]
    assert report["tokenizer"]["family"] == "binary_ae"
    page = read(workdir / "edit.png")
    assert page.shape[1] > 128
    if fields["kind"] == "interpolate":
        assert report["images"][0]["ratio"] == 0
        assert report["images"][-1]["ratio"] == 1
    if fields["kind"] == "enrich":
        assert report["images"][4] == {"variant": 1, "round": 2, "file": "edit_04.png"}
        assert report["passes"] == [16] * 12


def test_settings_reach_the_sampler(models, files, noise):
    fields = {"label": "2", "guidance": 5.0, "order": "cosine", "gumbel": 0.5, "batch_size": 7}
    edit.run(settings(models, files, image="picture.png", box=BOX, variants=3, **fields), files)
    (call,) = noise
    plan = call["plan"]
    assert (plan.iterations, plan.guidance, plan.order, plan.gumbel) == (4, 5.0, "cosine", 0.5)
    assert (plan.denoiser_steps, plan.segments) == (2, 1)
    assert (call["seed"], call["batch_size"]) == (SEED, 7)
    np.testing.assert_array_equal(call["work"].indices, [0, 1, 2])
    params = model_directory.load(models / "generator", "generator").params
    np.testing.assert_array_equal(call["work"].classes, [params["class_embedding"][2]] * 3)


def test_without_a_class_the_null_class_is_drawn(models, files, noise):
    edit.run(settings(models, files, image="picture.png", box=BOX, variants=1), files)
    params = model_directory.load(models / "generator", "generator").params
    np.testing.assert_array_equal(noise[0]["work"].classes[0], params["class_embedding"][5])


def test_classes_by_name(models, files, noise):
    edit.run(settings(models, kind="interpolate", labels="trio,five", steps=2), files)
    assert json.loads((files / "edit.json").read_text())["classes"] == [2, 4]
    with pytest.raises(UserError, match="cannot read the label 'six'"):
        edit.run(settings(models, files, label="six", **INPAINT), files)


def test_another_seed_shuffles_the_blocks_otherwise(models, loaded, files):
    c = settings(models, files, kind="enrich", image="picture.png", rounds=8)
    works = []
    for seed in (0, 1):
        c.seed = seed
        works.append(work_of(c, loaded)[0])
    orders = [[np.stack(masks).tobytes() for masks in work.rounds] for work in works]
    assert orders[0] != orders[1]
    assert len(set(orders[0])) > 1


@pytest.mark.parametrize(
    ("fields", "seen"),
    [
        ({"kind": "inpaint", "box": BOX}, lambda picture: center_crop(picture, 16)),
        ({"kind": "enrich", "rounds": 1}, lambda picture: editing.reduced_view(picture, 16, 2)),
    ],
)
def test_a_whole_run_draws_from_the_picture(models, loaded, files, monkeypatch, fields, seen):
    real, calls = redraw.redraw_images, []

    def draw(generator, tokenizer, work, plan, mesh, **options):
        made = real(generator, tokenizer, work, plan, mesh, **options)
        calls.append((work, *made))
        return made

    monkeypatch.setattr(redraw, "redraw_images", draw)
    edit.run(settings(models, files, image="picture.png", variants=2, **fields), files)
    ((work, bits, images),) = calls
    view = seen(inputs.read_picture(str(files / "picture.png")))
    encode = jax.jit(lambda p, x: loaded[1].module.apply({"params": p}, x, method="encode"))
    np.testing.assert_array_equal(work.known, encode(loaded[1].params, from_uint8(view[None]))[0])
    untouched = np.ones((8, 8), bool) if fields["kind"] == "inpaint" else np.zeros((8, 8), bool)
    for mask in work.rounds[0]:
        untouched &= ~mask
    np.testing.assert_array_equal(bits[:, 0, untouched], np.stack([work.known[untouched]] * 2))
    assert (bits[:, 0] != work.known).any()
    for i in range(2):
        np.testing.assert_array_equal(read(files / f"edit_{i:02d}.png"), images[i, 0])


@pytest.mark.parametrize("kind", ["inpaint", "outpaint"])
def test_blended_pictures_are_the_whole_picture(models, files, noise, kind):
    pytest.importorskip("cv2")
    c = settings(models, files, kind=kind, image="picture.png", box=BOX, variants=2, blend=True)
    edit.run(c, files)
    original, report = read(files / "picture.png"), json.loads((files / "edit.json").read_text())
    assert [name["blended"] for name in report["images"]] == ["blended_00.png", "blended_01.png"]
    for name in report["images"]:
        blended = read(files / name["blended"])
        assert blended.shape == original.shape
        if kind == "inpaint":  # outside of the box nothing changes at all
            outside = np.ones((HEIGHT, WIDTH), bool)
            outside[8:20, 12:24] = False
            np.testing.assert_array_equal(blended[outside], original[outside])
        else:  # and here nothing changes outside of the crop
            np.testing.assert_array_equal(blended[:, :4], original[:, :4])
        assert (blended != original).any()


@pytest.mark.parametrize("box", [(10, 9, 31, 30), (11, 9, 31, 31), (0, 0, 20, 20), (30, 0, 60, 40)])
def test_blending_moves_nothing_and_keeps_the_outer_colour(box):
    pytest.importorskip("cv2")
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(60, 140, (5, 7, 3)).astype(np.uint8))
    base = np.asarray(small.resize((60, 40), Image.Resampling.BICUBIC))
    area = np.zeros((40, 60), bool)
    area[box[1] : box[3], box[0] : box[2]] = True
    # The same picture in other colours comes out as the original: its detail is at its place. At
    # the border of the picture there is no outer colour to keep.
    same = editing.blend(base, base, area)
    np.testing.assert_allclose(same, base.astype(int), atol=2)
    if box[0] and box[2] < 60:
        shifted = editing.blend(base, base + np.uint8(60), area)
        np.testing.assert_allclose(shifted, base.astype(int), atol=3)
    np.testing.assert_array_equal(editing.blend(base, base + np.uint8(9), area)[~area], base[~area])


def test_blending_reaches_the_border_and_ignores_slivers():
    pytest.importorskip("cv2")
    base, patch = np.full((40, 40, 3), 50, np.uint8), np.full((40, 40, 3), 200, np.uint8)
    patch[::2] = 100
    area = np.zeros((40, 40), bool)
    area[:, :20] = True
    assert (editing.blend(base, patch, area)[:, 0] != 50).mean() > 0.9
    sliver = np.zeros((40, 40), bool)
    sliver[5:30, 7:9] = True
    np.testing.assert_array_equal(editing.blend(base, patch, sliver), base)
    np.testing.assert_array_equal(editing.blend(base, patch, np.zeros_like(area)), base)


# ---- Pictures and masks of all sorts ----


@pytest.mark.parametrize("size", [(300, 97), (16, 16), (7, 9), (33, 64)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "CMYK", "1"])
def test_any_picture_is_cropped_as_adm_does(models, tmp_path, size, mode):
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    rng = np.random.default_rng(0)
    whole = Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3)).astype(np.uint8))
    whole.convert(mode).save(path)
    picture = inputs.read_picture(str(path))
    assert picture.size == size
    left, top, side = editing.crop_square(picture, 16)
    assert side == min(size)
    assert 0 <= left <= size[0] - side
    assert 0 <= top <= size[1] - side
    # The crop's middle is the picture's.
    assert abs(2 * left + side - size[0]) <= max(2, 2 * side / 16)
    pasted = editing.paste_crop(picture, (left, top, side), np.zeros((16, 16, 3), np.uint8))
    assert not pasted[top : top + side, left : left + side].any()
    assert pasted.shape == (size[1], size[0], 3)


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert inputs.read_picture(str(tmp_path / "a.jpg")).size == (10, 20)


def test_masks_of_every_kind_mark_the_same(files):
    picture, plain = inputs.read_picture(str(files / "picture.png")), read(files / "mask.png")
    mask = Image.fromarray(plain)
    mask.convert("1").save(files / "one.png")
    mask.convert("RGB").save(files / "rgb.png")
    mask.convert("RGBA").save(files / "opaque.png")
    mask.save(files / "noisy.jpg", quality=95)
    mask.convert("P").save(files / "palette.png")
    # Painted on a transparent layer, in any colour.
    layer = Image.new("RGBA", mask.size, (0, 0, 0, 0))
    layer.paste((10, 20, 200, 255), (12, 8, 24, 20))
    layer.save(files / "layer.png")
    Image.merge("LA", (Image.new("L", mask.size, 0), mask)).save(files / "grey_alpha.png")
    expected = plain == 255
    assert expected.sum() == 144
    names = ("one.png", "rgb.png", "opaque.png", "noisy.jpg", "palette.png", "layer.png")
    for name in ("mask.png", "grey_alpha.png", *names):
        area = inputs.read_area(str(files / name), picture)
        np.testing.assert_array_equal(area, expected, err_msg=name)


def test_cells_are_read_at_their_first_pixel():
    pixels = np.zeros((16, 16), bool)
    pixels[4, 8] = True
    cells = redraw.cells_of(pixels, (8, 4))
    assert cells.shape == (8, 4)
    assert cells[2, 2]
    assert cells.sum() == 1
    pixels[:] = False
    pixels[5, 8] = True
    assert not redraw.cells_of(pixels, (8, 4)).any()


def test_sheet_has_a_label_above_each_cell():
    cell = np.full((16, 16, 3), 200, np.uint8)
    page = grids.sheet([[("original", cell), ("redrawn", cell)], [("variant 0", cell)]])
    assert page.shape[2] == 3
    assert (page.shape[0], page.shape[1]) == (2 * (128 + 18 + 6) + 6, 2 * (128 + 6) + 6)
    grey = (page == 200).all(-1)
    assert grey.sum() >= 3 * 128 * 128
    for top in (6, 158):  # black letters in each strip
        assert (page[top : top + 18, 6:134].min(-1) < 100).any()
    assert (page[158:, 140:] == page[0, 0]).all()


# ---- Bad input ----

INPAINT = {"image": "picture.png", "box": BOX}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**INPAINT, "kind": "paint"}, "unknown kind of edit 'paint', have .*'enrich'"),
        ({"box": BOX}, "inpaint needs config.edit.image"),
        ({"image": "picture.png"}, "inpaint needs config.edit.mask or config.edit.box"),
        ({**INPAINT, "mask": "mask.png"}, "not both"),
        ({**INPAINT, "kind": "edit"}, "edit needs config.edit.label"),
        ({**INPAINT, "kind": "enrich"}, "enrich does not use config.edit.mask or config.edit.box"),
        ({**INPAINT, "labels": "1,2"}, "inpaint does not use config.edit.labels"),
        ({"kind": "interpolate"}, "interpolate needs config.edit.labels"),
        ({"kind": "interpolate", "labels": "1"}, "config.edit.labels takes 2 .* got '1'"),
        ({"kind": "interpolate", "labels": "1,7"}, "label 7 is out of range.* 0 to 4"),
        ({"kind": "interpolate", "labels": "1,2", "steps": 1}, "steps must be 2 or more"),
        ({"kind": "interpolate", "labels": "1,2", "image": "picture.png"}, "not use .*edit.image"),
        ({"kind": "enrich", "image": "picture.png", "blend": True}, "not use config.edit.blend"),
        ({"kind": "enrich", "image": "picture.png", "downsample": 1}, "downsample must be 2 or"),
        ({"kind": "enrich", "image": "picture.png", "rounds": 0}, "rounds must be 1 or more"),
        ({**INPAINT, "variants": -1}, "variants must be 0 or more, got -1"),
        ({**INPAINT, "order": "sideways"}, "unknown order 'sideways'"),
        ({**INPAINT, "label": "5"}, "label 5 is out of range.* 0 to 4"),
        ({**INPAINT, "label": "1,2"}, "config.edit.label takes 1 .* got '1,2'"),
        ({**INPAINT, "image": "none.png"}, "cannot read the picture .*none.png: No such file"),
        ({**INPAINT, "image": "."}, "cannot read the picture .*: Is a directory"),
        ({**INPAINT, "image": "text.png"}, "cannot read .*text.png as a picture: not an image"),
        ({"image": "picture.png", "mask": "none.png"}, "cannot read the mask .*none.png"),
        ({"image": "picture.png", "mask": "text.png"}, "cannot read .*text.png as a picture"),
        ({"image": "picture.png", "mask": "small.png"}, "20x16 and the picture is 40x32"),
        ({"image": "picture.png", "mask": "black.png"}, "black.png marks nothing"),
        ({"image": "picture.png", "mask": "white.png"}, "all 8x8 tokens.* left to keep"),
        (
            {"kind": "outpaint", "image": "picture.png", "mask": "white.png"},
            "all 8x8 tokens.* left to draw",
        ),
        ({"image": "picture.png", "box": "0,0,3,32"}, "holds none of the 8x8 tokens"),
        ({"image": "picture.png", "box": "0,0,41,8"}, "outside of the picture: x goes .* 40"),
        ({"image": "picture.png", "box": "-1,0,4,8"}, "outside of the picture"),
        ({"image": "picture.png", "box": "8,8,8,12"}, "is empty or outside"),
        ({"image": "picture.png", "box": "1,2,3"}, "cannot read the box '1,2,3'"),
        ({"image": "picture.png", "box": "a,b,c,d"}, "cannot read the box"),
    ],
)
def test_bad_input_is_one_clear_line(models, files, fields, message):
    (files / "text.png").write_text("no picture")
    Image.new("L", (20, 16), 255).save(files / "small.png")
    Image.new("L", (WIDTH, HEIGHT), 0).save(files / "black.png")
    Image.new("L", (WIDTH, HEIGHT), 255).save(files / "white.png")
    before = sorted(files.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        edit.run(settings(models, files, **fields), files)
    assert "\n" not in str(caught.value)
    assert sorted(files.iterdir()) == before


def test_models_that_cannot_edit(models, files):
    c = settings(models, files, **INPAINT)
    c.generator = str(models / "tokenizer")
    with pytest.raises(UserError, match=r"holds a tokenizer .*not a generator"):
        edit.run(c, files)
    c.generator, c.tokenizer = str(models / "generator"), ""
    with pytest.raises(UserError, match="no tokenizer given"):
        edit.run(c, files)
    odd = build_models(side=5)[1]
    model_directory.write(files / "odd", odd.info, odd.params)
    c.tokenizer = str(files / "odd")
    with pytest.raises(UserError, match="do not fit: grid"):
        edit.run(c, files)


def test_a_generator_of_another_family_is_named(models, files, monkeypatch):
    c, whole = settings(models, files, **INPAINT), model_directory.load

    def load_other(path, kind, *args):
        model = whole(path, kind, *args)
        if kind == "tokenizer":
            return model
        other = whole(models / "tokenizer", "tokenizer").module
        return model_directory.Model(other, {}, {**model.info, "family": "bitdance"}, model.path)

    monkeypatch.setattr(model_directory, "load", load_other)
    with pytest.raises(UserError, match=r"edit needs a bigr generator, .* is a bitdance"):
        edit.run(c, files)


def test_blending_without_opencv_says_what_to_install(models, files, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match=r"pip install 'bitgen\[edit\]'"):
        edit.run(settings(models, files, blend=True, **INPAINT), files)


def test_the_shipped_config_names_released_models():
    c: Any = runpy.run_path("configs/bigr_edit.py")["get_config"]()
    assert c.generator.startswith("zoo:bigr_L")
    assert c.tokenizer.startswith("zoo:bigr_bae")
    assert c.edit.kind in edits.KINDS
