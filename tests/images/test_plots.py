"""Plots show every value."""

import numpy as np
import pytest
from PIL import Image

from bitgen import UserError
from bitgen.images import plots
from bitgen.training.metrics import RunLog

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # the first colours of matplotlib


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
