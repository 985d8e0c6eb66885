"""Each source reads back what was put in, and says in one line what is wrong with a path."""

import concurrent.futures
import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bitgen import data
from bitgen.data import tar
from bitgen.data.sources import FolderSource, TfdsSource
from bitgen.errors import UserError


def config(**changes):
    c = data.default_config()
    c.update(changes)
    return c


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, value, value)).save(file, "PNG")
    return file.getvalue()


def test_unknown_source_names_the_choices():
    known = "['bits', 'digits', 'folder', 'list', 'npz', 'tar', 'tfds']"
    with pytest.raises(UserError) as error:
        data.make_source(config(source="lmdb"))
    assert str(error.value) == f"unknown data source 'lmdb', have {known}"


def test_digits_are_white_on_black_at_the_size_asked_for():
    source = data.make_source(config(source="digits", image_size=32))
    assert (len(source), source.num_classes) == (1797, 10)
    image = source[0]["image"]
    assert (image.shape, image.dtype) == ((32, 32, 3), np.uint8)
    assert image.max() > 200  # the strokes
    assert image[:, 0].mean() < 20  # the border
    np.testing.assert_array_equal(image[..., 0], image[..., 2])
    assert sorted({source[i]["label"] for i in range(20)}) == list(range(10))
    assert data.make_source(config(image_size=8))[0]["image"].shape == (8, 8, 3)


# folder


def test_folder_classes_are_sorted_and_suffixes_are_in_either_case(tmp_path):
    files = [
        "dog/2.JPEG",
        "dog/1.webp",
        "cat/a.png",
        "cat/deep/b.Jpg",
        "cat/notes.txt",
        ".git/x.png",
    ]
    for value, name in enumerate([*files, "cat/.hidden.png"]):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(value))
    source = data.make_source(config(source="folder", path=str(tmp_path)))
    assert (source.class_names, source.num_classes) == (["cat", "dog"], 2)
    found = [(os.path.relpath(source[i]["name"], tmp_path), source[i]["label"]) for i in range(4)]
    assert found == [("cat/a.png", 0), ("cat/deep/b.Jpg", 0), ("dog/1.webp", 1), ("dog/2.JPEG", 1)]
    assert len(source) == 4
    assert source[2]["image"] == png(1)


def test_folder_errors(tmp_path):
    def error(path) -> str:
        with pytest.raises(UserError) as caught:
            FolderSource(str(path))
        return str(caught.value)

    assert "does not exist; wanted one sub-folder per class" in error(tmp_path / "no")
    assert "image folder '' does not exist" in error("")
    (tmp_path / "empty").mkdir()
    assert "is empty" in error(tmp_path / "empty")
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat" / "1.png").write_bytes(png(0))
    assert "has no class sub-folders" in error(tmp_path / "flat")
    (tmp_path / "flat" / "cat").mkdir()
    assert "cat' has no images (.bmp" in error(tmp_path / "flat")


# list of files


def listed(folder, text: str):
    for value, name in enumerate(["a.png", "two words.png"]):
        (folder / name).write_bytes(png(value))
    path = folder / "val.txt"
    path.write_text(text)
    return data.make_source(config(source="list", path=str(path)))


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("a.png\n\ntwo words.png\n", [0, 0]),
        ("a.png 3\r\ntwo words.png\t0\r\n", [3, 0]),
        ("a.png 375 500\ntwo words.png 2 3", [0, 0]),  # height and width, as BitVAE's files
    ],
)
def test_list_names_its_images(tmp_path, text, labels):
    source = listed(tmp_path, text)
    assert [source[i]["label"] for i in range(len(source))] == labels
    assert [source[i]["image"] for i in range(2)] == [png(0), png(1)]
    assert source[1]["name"] == str(tmp_path / "two words.png")
    assert source.num_classes == max(labels) + 1 == len(source.class_names)


def test_list_takes_absolute_paths_and_repetitions(tmp_path):
    source = listed(tmp_path, f"{tmp_path}/a.png\n" * 5)
    assert (len(source), source[4]["name"]) == (5, f"{tmp_path}/a.png")


def test_list_errors_name_the_line(tmp_path):
    with pytest.raises(UserError, match=r"val.txt line 3: there is no file .*/b.png$"):
        listed(tmp_path, "a.png 1\n\nb.png 2\n")
    with pytest.raises(UserError, match=r"line 2: not all lines have a label; wanted one image"):
        listed(tmp_path, "a.png 1\ntwo words.png\n")
    with pytest.raises(UserError, match="line 2: not all lines have a label"):
        listed(tmp_path, "a.png\ntwo words.png 1\n")
    with pytest.raises(UserError, match="is empty; wanted"):
        listed(tmp_path, "\n \n")
    (tmp_path / "no.txt").write_bytes(png(0))
    for path, message in (
        ("no.txt", "is not a text file"),
        ("other.txt", "does not exist; set config"),
    ):
        with pytest.raises(UserError, match=message):
            data.make_source(config(source="list", path=str(tmp_path / path)))


# tar of tars


def make_tar(path: Path, classes: dict[str, dict[str, bytes]]) -> None:
    def add(target: tarfile.TarFile, name: str, content: bytes) -> None:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        target.addfile(member, io.BytesIO(content))

    with tarfile.open(path, "w") as outer:
        for name, images in classes.items():
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as target:
                for image, content in images.items():
                    add(target, image, content)
            add(outer, name + ".tar", inner.getvalue())


CLASSES = {
    # Not in order of their names, and sizes that are and are not whole blocks of 512.
    "n03": {f"n03_{i}.JPEG": bytes([i]) * size for i, size in enumerate([1, 511, 512, 513])},
    "n01": {f"n01_{i}.JPEG": bytes([9 + i]) * size for i, size in enumerate([5000, 7])},
    "n02": {"n02_" + "long" * 40 + ".JPEG": b"long name"},
}


@pytest.fixture
def images_tar(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    make_tar(tmp_path / "images.tar", CLASSES)
    return tmp_path / "images.tar"


def check_tar(source) -> None:
    assert source.class_names == ["n01", "n02", "n03"]
    expected = [
        (label, name, content)
        for label, key in enumerate(["n01", "n02", "n03"])
        for name, content in CLASSES[key].items()
    ]
    assert len(source) == len(expected)
    for i, (label, name, content) in enumerate(expected):
        example = source[i]
        assert (example["label"], example["image"]) == (label, content)
        assert example["name"].endswith(f"n0{label + 1}.tar:{name}")


def test_tar_is_read_byte_for_byte(images_tar):
    source = data.make_source(config(source="tar", path=str(images_tar)))
    check_tar(source)
    check_tar(pickle.loads(pickle.dumps(source)))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        contents = list(pool.map(lambda i: source[i % 7]["image"], range(700)))
    assert contents == [source[i % 7]["image"] for i in range(700)]


def test_tar_index_reads_headers_only(images_tar, monkeypatch):
    counted = []
    pread = os.pread

    def count(file, size, offset):
        counted.append(size)
        return pread(file, size, offset)

    monkeypatch.setattr(os, "pread", count)
    make_tar(images_tar, {"a": {"1.JPEG": bytes(10_000_000)}, "b": {"2.JPEG": bytes(1_000_000)}})
    data.make_source(config(source="tar", path=str(images_tar)))
    assert sum(counted) < 20_000


def test_tar_index_is_kept_and_made_again_when_the_tar_changes(images_tar, monkeypatch):
    c = config(source="tar", path=str(images_tar))
    data.make_source(c)
    kept = images_tar.with_name("images.tar.index.npz")
    assert kept.is_file()
    reads = []
    read_index = tar._read_index
    monkeypatch.setattr(tar, "_read_index", lambda path: reads.append(path) or read_index(path))
    check_tar(data.make_source(c))
    assert not reads
    os.utime(images_tar, ns=(1, 1))
    check_tar(data.make_source(c))
    assert len(reads) == 1
    kept.write_bytes(kept.read_bytes()[:100])  # damaged
    check_tar(data.make_source(c))
    assert len(reads) == 2
    assert not list(images_tar.parent.glob("*.part"))


def test_tar_index_goes_to_the_users_cache_beside_a_read_only_tar(images_tar, monkeypatch):
    images_tar.with_name("images.tar.index.npz").mkdir()  # nothing can be put there
    c = config(source="tar", path=str(images_tar))
    data.make_source(c)
    assert len(list((images_tar.parent / "cache" / "bitgen").glob("tar-*.index.npz"))) == 1
    monkeypatch.setattr(tar, "_read_index", None)
    check_tar(data.make_source(c))


def test_tar_without_any_place_for_its_index_still_works(images_tar, monkeypatch, caplog):
    images_tar.with_name("images.tar.index.npz").mkdir()
    (images_tar.parent / "cache").write_text("a file")
    check_tar(data.make_source(config(source="tar", path=str(images_tar))))
    assert "cannot be stored" in caplog.text


def test_tar_errors(tmp_path):
    def error(path) -> str:
        with pytest.raises(UserError) as caught:
            data.make_source(config(source="tar", path=str(path)))
        return str(caught.value)

    path = tmp_path / "a.tar"
    assert "a.tar' does not exist; set config.data.path" in error(path)
    path.write_bytes(b"x" * 5000)
    assert "is not a tar file, or it is damaged" in error(path)
    with tarfile.open(path, "w") as flat:
        flat.addfile(tarfile.TarInfo("1.JPEG"), io.BytesIO())
    assert "holds no inner tars" in error(path)
    make_tar(path, {"n01": {}, "n02": {"1.JPEG": b"1"}})
    assert "inner tar n01.tar holds no images" in error(path)
    make_tar(path, CLASSES)
    for size in (len(path.read_bytes()) * 2 // 5, 6000):  # between members, and inside of one
        part = tmp_path / f"part{size}.tar"
        part.write_bytes(path.read_bytes()[:size])
        assert "is not a tar file, or it is damaged" in error(part)
    assert not list(tmp_path.glob("*.npz"))


# TensorFlow Datasets


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory) -> str:
    """Two small builders, prepared without a network."""
    import tensorflow_datasets as tfds

    class Small(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("1.0.0")
        FEATURES: dict = {}  # noqa: RUF012

        def _info(self):
            features = tfds.features.FeaturesDict(self.FEATURES)
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for i in range(6):
                example = {
                    "image": np.full((8, 8, 3), 40 * i, np.uint8),
                    "label": i % 2,
                    "text": str(i),
                }
                yield i, {key: example[key] for key in self.FEATURES}

    image = tfds.features.Image(shape=(8, 8, 3))
    label = tfds.features.ClassLabel(names=["ant", "bee"])
    directory = str(tmp_path_factory.mktemp("tfds"))
    for name, features in {
        "with_labels": {"image": image, "label": label},
        "without_labels": {"image": image},
        "numbers": {"image": image, "label": np.int64},
        "text_only": {"text": tfds.features.Text()},
    }.items():
        kind = type(name, (Small,), {"FEATURES": features, "name": name}, skip_registration=True)
        kind(data_dir=directory, file_format="array_record").download_and_prepare()
    return directory


def test_tfds_builder_is_read_by_random_access(tfds_dir):
    c = config(source="tfds", builder="with_labels", path=tfds_dir, image_size=8, split="all")
    source = data.make_source(c)
    assert (len(source), source.class_names) == (6, ["ant", "bee"])
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i in (5, 0, 3):
            image = np.asarray(Image.open(io.BytesIO(copy[i]["image"])))
            # The builder has shuffled them: the colour says which one it is.
            assert copy[i]["label"] == (image[0, 0, 0] // 40) % 2
    batch = next(data.make_batches(c, batch_size=6, seed=0, training=False))
    assert sorted(batch["image"][:, 0, 0, 0]) == [0, 40, 80, 120, 160, 200]
    np.testing.assert_array_equal(batch["image"][:, 0, 0, 0] // 40 % 2, batch["label"])
    assert len(TfdsSource("with_labels", "train[:2]", tfds_dir)) == 2


def test_tfds_without_labels_is_one_class(tfds_dir):
    source = TfdsSource("without_labels", "train", tfds_dir)
    assert (source.num_classes, source[0]["label"]) == (1, 0)


def test_tfds_errors_are_one_line(tfds_dir):
    def error(builder: str, split: str) -> str:
        with pytest.raises(UserError) as caught:
            TfdsSource(builder, split, tfds_dir)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "needs config.data.builder" in error("", "train")
    assert "cannot open tfds no_such[train]" in error("no_such", "train")
    assert "Unknown split 'test'" in error("with_labels", "test")
    assert "the labels of tfds numbers[train] are not classes" in error("numbers", "train")
    assert "has no 'image' feature, it has ['text']" in error("text_only", "train")
