"""Output of images: every kind holds the same images, and resumes after a kill."""

import numpy as np
import pytest
from PIL import Image

from bitgen.errors import UserError
from bitgen.images import output
from bitgen.labels import imagenet_names, parse_labels

LABELS = np.repeat(np.arange(5), 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (15, 4, 4, 3), np.uint8)
SETTINGS = {"seed": 0, "sampler": {"iterations": 3}}


def write(path, batch, stop=None):
    """Adds batches from where the output stands; `stop` leaves early, as a kill does."""
    sink = output.make_output(path, LABELS, 3, SETTINGS)
    while sink.next_index < 15:
        start = sink.next_index
        sink.add(IMAGES[start : start + batch])
        if stop is not None and sink.next_index >= stop:
            return None
    return sink.finish()


def test_grid_has_a_row_a_label(tmp_path):
    write(tmp_path / "s.png", 4)
    picture = np.asarray(Image.open(tmp_path / "s.png"))
    assert picture.shape == (20, 12, 3)
    np.testing.assert_array_equal(picture[4:8, 8:12], IMAGES[5])


@pytest.mark.parametrize("stop", [None, 3, 6, 12])
def test_folder_and_npz_go_on_after_a_kill(tmp_path, monkeypatch, stop):
    monkeypatch.setattr(output, "_CHUNK", 4)
    for path in (tmp_path / "folder", tmp_path / "s.npz"):
        if stop:
            write(path, 3, stop)
            assert not (tmp_path / "s.npz").exists()
        write(path, 2)
    for i in range(15):
        file = tmp_path / "folder" / f"{i:06d}_{LABELS[i]:04d}.png"
        np.testing.assert_array_equal(np.asarray(Image.open(file)), IMAGES[i])
    with np.load(tmp_path / "s.npz") as arrays:
        np.testing.assert_array_equal(arrays["arr_0"], IMAGES)
        np.testing.assert_array_equal(arrays["arr_1"], LABELS)
    assert not (tmp_path / "s.npz.part").exists()


def test_other_settings_are_refused(tmp_path):
    write(tmp_path / "folder", 3, 6)
    with pytest.raises(UserError, match="started with seed=0, now seed=1"):
        output.make_output(tmp_path / "folder", LABELS, 3, {**SETTINGS, "seed": 1})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        output.make_output(tmp_path / "other", LABELS, 3, SETTINGS)
    write(tmp_path / "s.npz", 15)
    with pytest.raises(UserError, match="already exists"):
        output.make_output(tmp_path / "s.npz", LABELS, 3, SETTINGS)
    with pytest.raises(UserError, match=r"NAME\.png"):
        output.make_output(tmp_path / "s.gif", LABELS, 3, SETTINGS)


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("3", [3]),
        ("0-2, 7", [0, 1, 2, 7]),
        ("goldfish, n", None),
        ("goldfish,Great White Shark", [1, 2]),
        ("black-footed ferret", [359]),
        ("otter,ottre", None),
        ("crane", None),
        ("1000", None),
        ("", None),
    ],
)
def test_labels_by_index_range_and_name(text, labels):
    names = imagenet_names()
    assert len(names) == 1000
    if labels is None:
        with pytest.raises(UserError, match=r"cannot read|names classes 134, 517|out of range"):
            parse_labels(text, 1000, names)
    else:
        assert parse_labels(text, 1000, names).tolist() == labels
    assert len(parse_labels("all", 1000, names)) == 1000


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_write_png_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new" / "a.png"
    array = noise(5, 6)
    output.write_png(path, array)
    np.testing.assert_array_equal(np.asarray(Image.open(path)), array)

    def fail(image, file, format):
        file.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        output.write_png(path, noise(5, 6, seed=1))
    assert [p.name for p in path.parent.iterdir()] == ["a.png"]
    np.testing.assert_array_equal(np.asarray(Image.open(path)), array)


def test_write_png_refuses_floats(tmp_path):
    with pytest.raises(UserError, match=r"takes uint8 \[H, W, 3\], got float32 \[4, 4, 3\]"):
        output.write_png(tmp_path / "a.png", np.zeros((4, 4, 3), np.float32))
    assert not list(tmp_path.iterdir())
