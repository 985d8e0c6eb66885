"""Animations of the sampler."""

import json
from typing import Any

import numpy as np
import pytest
from helpers import small
from PIL import Image

from bitgen import UserError, config
from bitgen.images import animation
from bitgen.modes import sample


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
