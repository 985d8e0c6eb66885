"""The npz source reads back what was put in, and says in one line what is wrong with a file."""

import pickle

import numpy as np
import pytest

from bitgen import data
from bitgen.data.sources import NpzSource
from bitgen.errors import UserError

IMAGES = np.random.default_rng(0).integers(0, 256, (6, 5, 4, 3), np.uint8)
LABELS = np.asarray([0, 2, 1, 2, 0, 2], np.int64)


def save(path, **arrays) -> str:
    np.savez(path, **arrays)
    return str(path)


def test_images_and_labels_come_back(tmp_path):
    path = save(tmp_path / "tiles.npz", image=IMAGES, label=LABELS, other=np.zeros(3))
    c = data.default_config()
    c.update(source="npz", path=path)
    source = data.make_source(c)
    assert (len(source), source.num_classes, list(source.class_names)) == (6, 3, ["0", "1", "2"])
    for s in (source, pickle.loads(pickle.dumps(source))):
        np.testing.assert_array_equal([s[i]["image"] for i in range(6)], IMAGES)
        assert [s[i]["label"] for i in range(6)] == LABELS.tolist()
    assert source[3]["name"] == f"{path} 3"


def test_compressed_and_without_labels(tmp_path):
    np.savez_compressed(tmp_path / "x.npz", image=IMAGES)
    source = NpzSource(str(tmp_path / "x.npz"))
    assert (source.num_classes, source[5]["label"]) == (1, 0)
    np.testing.assert_array_equal(source[5]["image"], IMAGES[5])


def test_batches_are_made_of_it(tmp_path):
    path = save(tmp_path / "tiles.npz", image=IMAGES[:, :4], label=LABELS)
    c = data.default_config()
    c.update(source="npz", path=path, image_size=4, split="all", threads=1)
    batches = data.make_batches(c, batch_size=6, seed=0, training=False)
    batch = next(batches)
    batches.close()
    np.testing.assert_array_equal(batch["image"], IMAGES[:, :4])
    np.testing.assert_array_equal(batch["label"], LABELS)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, r"has \['images'\] and no 'image'"),
        ({"image": IMAGES.astype(np.float32)}, r"image in npz file .* is float32 \[6, 5, 4, 3\]"),
        ({"image": IMAGES[..., 0]}, r"is uint8 \[6, 5, 4\]"),
        ({"image": IMAGES[:0]}, r"is uint8 \[0, 5, 4, 3\]"),
        ({"image": np.uint8(1)}, r"is uint8 \[\]"),
        ({"image": IMAGES, "label": LABELS[:4]}, r"is int64 \[4\] for 6 images"),
        ({"image": IMAGES, "label": LABELS / 2}, r"label .* is float64 \[6\]"),
        ({"image": IMAGES, "label": LABELS - 1}, "negative numbers"),
        ({"image": np.asarray([None, 1], object)}, "cannot be read"),
    ],
)
def test_other_arrays_are_named(tmp_path, arrays, message):
    path = save(tmp_path / "x.npz", **arrays)
    with pytest.raises(UserError, match=message) as error:
        NpzSource(path)
    assert "wanted an npz file with image, uint8 [n, H, W, 3]" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_npz_are_named(tmp_path):
    with pytest.raises(UserError, match="npz file '' does not exist; set config"):
        NpzSource("")
    with pytest.raises(UserError, match="does not exist"):
        NpzSource(str(tmp_path))
    (tmp_path / "x.npz").write_bytes(b"PK no zip")
    with pytest.raises(UserError, match=r"x.npz' cannot be read"):
        NpzSource(str(tmp_path / "x.npz"))
    whole = (tmp_path / "y.npz", save(tmp_path / "y.npz", image=IMAGES))[0].read_bytes()
    (tmp_path / "x.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"x.npz' cannot be read"):
        NpzSource(str(tmp_path / "x.npz"))
