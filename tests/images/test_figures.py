"""Pictures for people: what they show, and that the modes write them."""

import json
from typing import Any

import numpy as np
import pytest
from helpers import small
from PIL import Image

from bitgen import UserError, config
from bitgen.images import animation, grids, plots
from bitgen.modes import sample
from bitgen.training.metrics import RunLog

RNG = np.random.default_rng(0)
BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # the first colours of matplotlib
IMAGES = RNG.integers(0, 256, (5, 8, 8, 3), np.uint8)


def test_captions_stand_above_their_images_and_are_cut():
    short = grids.captioned_grid(IMAGES, ["a", "b", "c", "d", "e"], 3)
    wide = grids.captioned_grid(IMAGES, ["tench, Tinca tinca, and its kin"] * 5, 3)
    assert short.shape == wide.shape
    enlarged = IMAGES[4].repeat(16, 0).repeat(16, 1)  # to 128 pixels
    below = short[-134:-6]
    assert any((below[:, x : x + 128] == enlarged).all() for x in range(short.shape[1] - 128))
    with pytest.raises(UserError, match="5 images, 1 captions"):
        grids.captioned_grid(IMAGES, ["a"], 3)


def test_planes_show_where_a_bit_is_set():
    bits = np.zeros((4, 4, 10), bool)
    bits[1, 2, 9] = True
    page = grids.bit_planes(bits, IMAGES[0])
    white = (page == 255).all(-1)
    assert white.sum() == 32 * 32  # one token of one plane, of 128 pixels
    rows, columns = np.nonzero(white)
    assert np.ptp(rows) == np.ptp(columns) == 31
    assert rows.min() > page.shape[0] / 2  # in the second row of planes
    with pytest.raises(UserError, match="bool"):
        grids.bit_planes(np.zeros((4, 4, 10)))


def test_curves_of_a_run(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        plots.training_curves(tmp_path)
    log = RunLog(tmp_path)
    for step in range(1, 30):
        log.scalars(step, {"loss": 1 / step, "accuracy": float("nan"), "images_per_second": 3.0})
    log.close()
    with Image.open(tmp_path / "curves.png") as image:
        assert image.size == (2 * 640, 420)
    page = plots.training_curves(tmp_path / "metrics.jsonl", ["loss"])
    assert page.shape == (420, 640, 3)
    line = (page == BLUE).all(-1)
    heights = [np.nonzero(column)[0].mean() for column in line.T if column.any()]
    assert heights[0] < heights[len(heights) // 2] < heights[-1]  # it falls
    with pytest.raises(UserError, match="no metric 'fid', have"):
        plots.training_curves(tmp_path, ["fid"])
    (tmp_path / "metrics.jsonl").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        plots.training_curves(tmp_path)


def test_bars_are_as_high_as_their_values():
    ones, entropy = np.array([[0.0, 0.5, 1.0]]), np.array([[0.25, 1.0, 0.25]])
    page = plots.plot_bits(ones, entropy)
    assert page.shape == (220, 2 * 640, 3)
    halves = [(half == BLUE).all(-1).sum(0) for half in np.split(page, 2, axis=1)]
    heights = [sorted(set(half[half > 2].tolist())) for half in halves]
    for low, high, ratio in ((*heights[0], 0.5), (*heights[1], 0.25)):
        assert low / high == pytest.approx(ratio, abs=0.03)
    scales = plots.plot_bits(ones.repeat(3, 0), entropy.repeat(3, 0), ["1x1", "2x2", "4x4"])
    assert scales.shape == (3 * 220, 2 * 640, 3)


def test_points_and_curves_show_every_series():
    points = [(1.0, 2.0), (2.0, 1.0)]
    plain = plots.plot_points(points, "x", "y")
    assert (plain != plots.plot_points(points, "x", "y", ["a", "b"])).any()
    both = plots.plot_curves({"one": points, "two": [(1.0, 1.0), (2.0, 2.0)]}, "x", "y")
    for colour in (BLUE, ORANGE):
        assert (both == colour).all(-1).sum() > 100


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_animations_play(tmp_path, suffix):
    frames = [np.full((64, 64, 3), value, np.uint8) for value in (0, 120, 255)]
    animation.write_animation(tmp_path / f"a.{suffix}", frames)
    with Image.open(tmp_path / f"a.{suffix}") as image:
        assert image.n_frames == 3
        image.seek(2)
        assert np.asarray(image.convert("RGB")).mean() > 250
    for bad in ([], [frames[0], frames[1][:32]]):
        with pytest.raises(UserError, match="frames of one size"):
            animation.write_animation(tmp_path / f"b.{suffix}", bad)
    assert [path.name for path in tmp_path.iterdir()] == [f"a.{suffix}"]


@pytest.mark.slow
def test_sample_writes_captions_and_the_order(tmp_path):
    generator, tokenizer = small.write_models(tmp_path, "bitdance")
    c: Any = config.base("bitdance")
    c.generator, c.tokenizer = str(generator), str(tokenizer)
    c.sampler.update({"head_steps": 2, "guidance": 1.0, "segments": 1})
    c.sample.update({"labels": "0-3", "captions": True, "animation": "order.gif", "columns": 2})
    c.mesh.data = 8
    sample.run(c.lock(), tmp_path / "run")
    with Image.open(tmp_path / "run" / "samples.png") as image:
        assert image.size == (2 * 134 + 6, 2 * 152 + 6)
    with Image.open(tmp_path / "run" / "order.gif") as image:
        assert (image.n_frames, image.size) == (4, (8 * 64, 64))
        grey = []
        for frame in range(4):
            image.seek(frame)
            pixels = np.asarray(image.convert("RGB"))[:, : 4 * 64]
            grey.append((pixels == 96).all(-1).mean())
    np.testing.assert_allclose(grey, [0.75, 0.5, 0.25, 0], atol=0.03)
    c.unlock()
    c.sample.animation = "order.mp4"
    with pytest.raises(UserError, match=r"NAME\.gif or NAME\.webp, not order\.mp4"):
        sample.run(c, tmp_path / "run")
    c.sample.update({"animation": "", "output": "samples.npz"})
    with pytest.raises(UserError, match="captions is for a grid"):
        sample.run(c, tmp_path / "run")
    assert json.loads((generator / "model.json").read_text())["family"] == "bitdance"
