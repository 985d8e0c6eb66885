"""Order, resuming, augmentation and broken files: batches are a function of seed and place."""

import io
import itertools
import json
import logging

import grain
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from bitgen import data
from bitgen.data.batches import crop_share, split_indices
from bitgen.errors import UserError


def config(path="", **changes):
    c = data.default_config()
    c.update({"source": "folder", "path": str(path), "image_size": 8, "threads": 3, **changes})
    return c


def encode(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """23 images in two classes; blue says which one it is, red and green are noise."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(23):
        folder = root / ("ant" if i < 11 else "bee")
        folder.mkdir(exist_ok=True)
        array = rng.integers(0, 256, (12, 10, 3), dtype=np.uint8)
        array[..., 2] = 10 * i
        (folder / f"{i:02d}.png").write_bytes(encode(array))
    return root


@pytest.fixture
def bits(tmp_path):
    """20 examples of 16 bits whose first byte is the example and second the view."""
    packed = np.zeros((20, 2, 2, 2, 2), np.uint8)
    packed[..., 0] = np.arange(20)[:, None, None, None]
    packed[:, 1, ..., 1] = 1
    writer = data.PackedWriter(
        tmp_path / "bits",
        {
            **{"grid": [2, 2], "bits": 16, "views": 2, "num_classes": 5, "count": 20},
            **{"class_names": list("abcde"), "examples_per_shard": 8},
            **{"tokenizer": {}, "source": {}},
        },
    )
    writer.add(packed, np.arange(20) % 5)
    writer.finish()
    return tmp_path / "bits"


def make(c, training=True, batch_size=4, seed=7, **rest) -> data.Batches:
    return data.make_batches(c, batch_size=batch_size, seed=seed, training=training, **rest)


def take(batches, count: int) -> list[dict[str, np.ndarray]]:
    return list(itertools.islice(batches, count))


def ids(batches: list[dict[str, np.ndarray]]) -> list[int]:
    return [int(blue) // 10 for batch in batches for blue in batch["image"][:, 0, 0, 2]]


def assert_same(one, other) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert set(a) == set(b)
        for key in a:
            np.testing.assert_array_equal(a[key], b[key])


# order


def test_each_epoch_has_every_example_once_in_an_order_of_its_own(images):
    c = config(images, split="train", holdout=0.3)  # 16 of 23: 4 batches an epoch
    batches = make(c)
    assert (batches.num_examples, batches.num_classes) == (16, 2)
    assert batches.class_names == ["ant", "bee"]
    epochs = [ids(take(batches, 4)) for _ in range(3)]
    train = split_indices(23, "train", 0.3).tolist()
    assert [sorted(epoch) for epoch in epochs] == [train] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] == ids(take(make(c), 4))
    assert epochs[0] != ids(take(make(c, seed=8), 4))


def test_batches_run_across_the_end_of_an_epoch(images):
    c = config(images, split="all")  # 23 is no multiple of 4
    order = ids(take(make(c), 12))  # 48 = 2 * 23 + 2
    assert sorted(order[:23]) == sorted(order[23:46]) == list(range(23))


def test_labels_and_dtypes(images):
    batch = next(make(config(images)))
    assert (batch["image"].shape, batch["image"].dtype) == ((4, 8, 8, 3), np.uint8)
    assert batch["label"].dtype == np.int32
    assert batch["label"].tolist() == [int(i >= 11) for i in ids([batch])]


@pytest.mark.parametrize("training", [True, False])
def test_two_processes_see_the_rows_of_one(images, training):
    c = config(images, split="all", crop="random")
    together = take(make(c, training), 6)
    parts = [take(make(c, training, process_index=p, process_count=2), 6) for p in range(2)]
    assert [len(part) for part in parts] == [6, 6]
    joined = [
        {key: np.concatenate([first[key], second[key]]) for key in first}
        for first, second in zip(*parts, strict=True)
    ]
    assert_same(joined, together)


def test_processes_stay_in_step_in_evaluation_even_with_nothing_left(images):
    c = config(images, split="all")  # 23 = 5 * 4 + 3: the last rows are 2, 1
    sizes = [
        [len(b["label"]) for b in make(c, False, batch_size=20, process_index=p, process_count=4)]
        for p in range(4)
    ]
    assert sizes == [[5, 3], [5, 0], [5, 0], [5, 0]]
    last = take(make(c, False, batch_size=20, process_index=3, process_count=4), 2)[-1]
    assert last["image"].shape == (0, 8, 8, 3)


def test_evaluation_is_one_pass_in_order_without_augmentation(images):
    c = config(images, split="all", crop="random", flip=True)
    batches = make(c, False, batch_size=10)
    first = batches.get_state()
    passed = list(batches)
    assert [len(batch["label"]) for batch in passed] == [10, 10, 3]
    assert np.concatenate([batch["index"] for batch in passed]).tolist() == list(range(23))
    assert ids(passed) == list(range(23))
    plain = list(make(config(images, split="all", crop="center", flip=False), False, 10, seed=99))
    assert_same(passed, plain)
    batches.set_state(first)
    assert_same(list(batches), passed)
    assert ids(list(make(c, False, start=9))) == list(range(9, 23))


def test_the_split_is_fixed_and_disjoint():
    train, test = (split_indices(100, name, 0.1) for name in ("train", "test"))
    assert (len(train), len(test)) == (90, 10)
    assert sorted([*train, *test]) == list(range(100)) == split_indices(100, "all", 0.1).tolist()
    # The same on every machine, for ever: these were computed once.
    assert split_indices(20, "test", 0.2).tolist() == [2, 3, 11, 13]
    assert len(split_indices(3, "test", 0.01)) == 1  # never rounded down to none
    assert len(split_indices(3, "train", 0.0)) == 3


# augmentation


def test_flip_and_crop_change_with_the_place_and_not_with_the_threads(images):
    one = take(make(config(images, crop="random", threads=1)), 12)
    assert_same(one, take(make(config(images, crop="random", threads=7, prefetch=5)), 12))
    looks: dict[int, set[bytes]] = {}
    for i, image in zip(ids(one), np.concatenate([b["image"] for b in one]), strict=True):
        looks.setdefault(i, set()).add(image.tobytes())
    assert max(len(found) for found in looks.values()) > 1


def test_flip_mirrors_about_half(images):
    c = config(images, split="all", flip=True)
    plain = {i: b["image"][0] for b in make(c, False, 1) for i in ids([b])}
    mirrored = 0
    for batch in take(make(c, batch_size=23), 10):
        for i, image in zip(ids([batch]), batch["image"], strict=True):
            same = np.array_equal(image, plain[i])
            assert same != np.array_equal(image, plain[i][:, ::-1])
            mirrored += not same
    assert 80 < mirrored < 150  # of 230


@pytest.mark.parametrize("crop", ["center", "random", "resize"])
def test_every_crop_gives_the_size(images, crop):
    assert next(make(config(images, crop=crop, image_size=9)))["image"].shape == (4, 9, 9, 3)


def fading(images, **changes):
    """Settings where a random crop is never the centre crop; an epoch is 23 images."""
    scale = {"crop_scale_min": 0.4, "crop_scale_max": 0.5}
    fade = {"crop_fade_start": 2, "crop_fade_end": 6}
    return config(images, split="all", crop="random", **{**scale, **fade, **changes})


def test_the_share_of_random_crops_by_epoch():
    assert [crop_share(epoch, 2, 6) for epoch in range(8)] == [1, 1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert [crop_share(epoch, 700, 750) for epoch in (0, 700, 725, 749, 750)] == [
        *(1, 1, 0.5),
        *(pytest.approx(0.02), 0),
    ]
    assert crop_share(10**6, -1, -1) == 1


def test_the_random_crop_fades_to_the_centre_crop_and_the_flip_stays(images):
    c = fading(images)
    plain = {i: b["image"][0] for b in make(c, False, 1) for i in ids([b])}
    centre = np.zeros(8)
    mirrored = 0
    for seed in range(8):
        for epoch, batch in enumerate(take(make(c, batch_size=23, seed=seed), 8)):
            for i, image in zip(ids([batch]), batch["image"], strict=True):
                flipped = np.array_equal(image, plain[i][:, ::-1])
                centre[epoch] += flipped or np.array_equal(image, plain[i])
                mirrored += flipped and epoch >= 6
    shares = centre / (8 * 23)
    assert shares[:3].tolist() == [0, 0, 0]
    np.testing.assert_allclose(shares[3:6], [0.25, 0.5, 0.75], atol=0.12)
    assert shares[6:].tolist() == [1, 1]
    assert 140 < mirrored < 230  # of 368


def test_a_fade_resumes_exactly_with_other_threads_processes_and_batch_size(images):
    batches = make(fading(images), batch_size=4)
    take(batches, 18)  # 72 examples: in epoch 3
    state = json.loads(json.dumps(batches.get_state()))
    rest = np.concatenate([b["image"] for b in take(batches, 18)])  # up to epoch 6
    parts = []
    for process in range(2):
        other = make(
            fading(images, threads=1), batch_size=8, process_index=process, process_count=2
        )
        other.set_state(state)
        parts.append([b["image"] for b in take(other, 9)])
    again = np.concatenate([part for pair in zip(*parts, strict=True) for part in pair])
    np.testing.assert_array_equal(again, rest)


def test_bits_give_one_view_and_flip_gives_either(bits):
    c = config(bits, source="bits", split="all", flip=True)
    batch = np.concatenate([b["bits"] for b in take(make(c), 40)])
    assert (batch.shape, batch.dtype) == ((160, 2, 2, 2), np.uint8)
    assert 50 < batch[:, 0, 0, 1].sum() < 110
    assert sorted(batch[:20, 0, 0, 0]) == list(range(20))
    c.flip = False
    assert not np.concatenate([b["bits"] for b in take(make(c), 10)])[..., 1].any()
    c.flip = True
    passed = list(make(c, False, batch_size=8))
    assert [b["bits"].shape[0] for b in passed] == [8, 8, 4]
    assert not np.concatenate([b["bits"] for b in passed])[..., 1].any()
    assert np.concatenate([b["label"] for b in passed]).tolist() == [i % 5 for i in range(20)]
    assert make(c).source.meta["bits"] == 16


# resuming


@pytest.mark.parametrize("taken", [0, 2, 5, 7])  # an epoch is 5.75 batches
def test_resumes_at_the_exact_example(images, taken):
    c = config(images, split="all", crop="random", prefetch=4)
    batches = make(c)
    take(batches, taken)
    state = json.loads(json.dumps(batches.get_state()))
    rest = take(batches, 8)
    resumed = make(c)
    take(resumed, 1)  # also with batches already prepared
    resumed.set_state(state)
    assert_same(take(resumed, 8), rest)
    batches.set_state(state)
    assert_same(take(batches, 8), rest)


def test_resumes_with_other_threads_processes_and_batch_size(images):
    c = config(images, split="all", crop="random")
    batches = make(c)
    take(batches, 3)
    state = batches.get_state()
    rest = np.concatenate([b["image"] for b in take(batches, 6)])
    c.threads = 1
    other = make(c, batch_size=6)
    other.set_state(state)
    np.testing.assert_array_equal(np.concatenate([b["image"] for b in take(other, 4)]), rest)
    half = make(c, process_index=1, process_count=2)
    half.set_state(state)
    np.testing.assert_array_equal(next(half)["image"], rest[2:4])


def test_evaluation_resumes_too(images):
    batches = make(config(images, split="all"), False)
    take(batches, 2)
    state, rest = batches.get_state(), list(batches)
    batches.set_state(state)
    assert_same(list(batches), rest)
    assert ids(rest) == list(range(8, 23))


def test_grains_orbax_handler_saves_and_restores_it(images, tmp_path):
    c = config(images)
    batches = make(c)
    take(batches, 3)
    with ocp.CheckpointManager(tmp_path) as manager:
        save = grain.checkpoint.CheckpointSave(batches)
        manager.save(3, args=ocp.args.Composite(data=save))
        manager.wait_until_finished()
        rest = take(batches, 5)
        resumed = make(c)
        restore = grain.checkpoint.CheckpointRestore(resumed)
        manager.restore(3, args=ocp.args.Composite(data=restore))
    assert_same(take(resumed, 5), rest)


def test_state_of_other_data_or_seed_is_refused(images):
    state = make(config(images, split="all")).get_state()
    with pytest.raises(UserError, match="was saved with num_examples=23, now 21; resume with"):
        make(config(images)).set_state(state)
    with pytest.raises(UserError, match="was saved with seed=7, now 8"):
        make(config(images, split="all"), seed=8).set_state(state)


def test_worker_processes_give_the_same_batches_and_resume(images):
    c = fading(images, crop_fade_start=0, crop_fade_end=2)
    expected = take(make(c), 12)
    c.workers = 1
    batches = make(c)
    assert_same(take(batches, 4), expected[:4])
    state = batches.get_state()
    batches.close()
    resumed = make(c)
    resumed.set_state(state)
    assert_same(take(resumed, 8), expected[4:])
    resumed.close()
    with pytest.raises(ValueError, match="closed"):
        next(resumed)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [2, 3])
def test_more_worker_processes_change_nothing(images, workers):
    c = config(images, split="all", crop="random")
    expected = take(make(c), 12), list(make(c, False))
    c.workers = workers
    with_workers = make(c), make(c, False)
    assert_same(take(with_workers[0], 12), expected[0])
    assert_same(list(with_workers[1]), expected[1])
    for batches in with_workers:
        batches.close()


# broken files


@pytest.fixture
def broken(tmp_path):
    """20 images, of which 3, 8 and 15 are truncated, empty and no image."""
    (tmp_path / "cat").mkdir()
    for i in range(20):
        whole = encode(np.full((8, 8, 3), 10 * i, np.uint8))
        content = {3: whole[:50], 8: b"", 15: b"hello"}.get(i, whole)
        (tmp_path / "cat" / f"{i:02d}.png").write_bytes(content)
    return tmp_path


def test_broken_files_are_skipped_counted_and_named(broken, caplog):
    c = config(broken, split="all", max_broken_share=0.2)
    batches = make(c)
    with caplog.at_level(logging.WARNING):
        order = ids(take(batches, 10))  # two epochs
    assert batches.counts() == {"seen": 40, "broken": 6}
    # Each is replaced by the next one, so that batches are full.
    replaced = [*range(3), 4, *range(4, 8), 9, *range(9, 15), 16, *range(16, 20)]
    assert sorted(order[:20]) == sorted(order[20:]) == replaced
    named = [record.getMessage() for record in caplog.records]
    assert len(named) == 3  # once each
    for name, reason in (("03", "truncated"), ("08", "empty file"), ("15", "not an image")):
        assert sum(f"cat/{name}.png" in line and reason in line for line in named) == 1


def test_broken_files_leave_evaluation_batches_smaller(broken):
    batches = make(config(broken, split="all", max_broken_share=0.2), False)
    passed = list(batches)
    assert [batch["index"].tolist() for batch in passed] == [
        [0, 1, 2],
        [4, 5, 6, 7],
        [9, 10, 11],
        [12, 13, 14],
        [16, 17, 18, 19],
    ]
    assert batches.counts() == {"seen": 20, "broken": 3}


@pytest.mark.parametrize("training", [True, False])
def test_two_processes_agree_on_broken_files_too(broken, training):
    c = config(broken, split="all", max_broken_share=0.5)
    together = take(make(c, training), 5)
    parts = [take(make(c, training, process_index=p, process_count=2), 5) for p in range(2)]
    assert_same(
        [{k: np.concatenate([a[k], b[k]]) for k in a} for a, b in zip(*parts, strict=True)],
        together,
    )


def check_stops(batches, broken) -> None:
    with pytest.raises(UserError) as error:
        take(batches, 6)
    message = str(error.value)
    assert message.startswith(f"3 of 20 images in {broken} cannot be read (15% > 1%), first: ")
    assert message.endswith("; fix them or raise config.data.max_broken_share")
    assert "\n" not in message


@pytest.mark.parametrize("training", [True, False])
def test_too_many_broken_files_stop_the_run(broken, training):
    check_stops(make(config(broken, split="all"), training), broken)


def test_too_many_broken_files_stop_a_run_with_worker_processes(broken):
    batches = make(config(broken, split="all", workers=1))
    check_stops(batches, broken)
    batches.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_readable_stops_at_once(tmp_path, workers):
    (tmp_path / "cat").mkdir()
    for i in range(5):
        (tmp_path / "cat" / f"{i}.png").write_bytes(b"")
    batches = make(config(tmp_path, split="all", max_broken_share=1.0, workers=workers))
    with pytest.raises(UserError, match=r"^5 images in a row in .* cannot be read, first: .*png"):
        next(batches)
    batches.close()


def test_a_file_that_disappears_is_broken_too(broken, caplog):
    batches = make(config(broken, split="all", max_broken_share=1.0), False)
    (broken / "cat" / "00.png").unlink()
    assert len(list(batches)) == 5
    assert batches.counts()["broken"] == 4
    assert "No such file" in caplog.text


def test_a_bits_folder_is_written_around_broken_files_and_resumed(broken, tmp_path_factory):
    """The loop of --mode=tokenize, stopped after two batches and run again."""
    c = config(broken, split="all", max_broken_share=0.2)
    folder = tmp_path_factory.mktemp("bits")
    meta = {
        **{"grid": [1, 1], "bits": 8, "views": 1, "num_classes": 1, "class_names": ["cat"]},
        **{"count": 20, "examples_per_shard": 6, "tokenizer": {}, "source": {}},
    }

    def run(steps: int) -> data.PackedWriter:
        writer = data.PackedWriter(folder, meta)
        batches = make(c, False, start=writer.next_index)
        for batch in itertools.islice(batches, steps):
            packed = batch["image"][:, :1, None, :1, :1]  # the colour as the bits
            writer.add(packed, batch["label"], batch["index"])
        if steps > 5:
            writer.finish(broken=batches.counts()["broken"])
        return writer

    assert run(2).next_index == 6
    assert run(9).complete
    source = data.PackedSource(folder)
    colours = [int(source[i]["bits"].item()) for i in range(len(source))]
    assert colours == [10 * i for i in range(20) if i not in (3, 8, 15)]


# wrong settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"crop": "square"}, r"unknown crop 'square', have \['center', 'random', 'resize'\]"),
        ({"split": "val"}, r"unknown data split 'val', have \['all', 'test', 'train'\]"),
        ({"holdout": 1.5}, r"holdout must be in \[0, 1\), got 1.5"),
        (
            {"holdout": 0.0, "split": "test"},
            "split 'test' of 23 examples with holdout=0.0 is empty",
        ),
        ({"crop_scale_min": 1.2}, "0 < crop_scale_min <= crop_scale_max <= 1, got 1.2 and 1.0"),
        ({"crop_fade_start": 5}, "0 <= crop_fade_start < crop_fade_end, .* got 5 and -1"),
        ({"crop_fade_start": 5, "crop_fade_end": 5}, "or -1 for both, got 5 and 5"),
        ({"image_size": 0}, "config.data.image_size must be at least 1, got 0"),
        ({"threads": 0}, "config.data.threads must be at least 1"),
        ({"workers": -1}, "config.data.workers must be at least 0"),
        ({"prefetch": 0}, "config.data.prefetch must be at least 1"),
    ],
)
def test_wrong_settings_are_named(images, changes, message):
    with pytest.raises(UserError, match=message):
        make(config(images, **changes))


def test_wrong_arguments_are_named(images):
    c = config(images)
    with pytest.raises(UserError, match="batch size 5 cannot be divided among 2 processes"):
        make(c, batch_size=5, process_count=2)
    with pytest.raises(UserError, match="there is no process 2 of 2"):
        make(c, process_index=2, process_count=2)
    with pytest.raises(UserError, match=r"seed must be in \[0, 2\*\*32\), got -1"):
        make(c, seed=-1)
    with pytest.raises(UserError, match="start=99 is outside of the 21 examples"):
        make(c, False, start=99)


def test_odd_sizes_work(images):
    one = make(config(images, split="test", holdout=0.01))  # a single example, for ever
    assert len(set(ids(take(one, 3)))) == 1
    assert len(next(make(config(images), batch_size=1))["label"]) == 1
    assert len(next(make(config(images, split="all"), batch_size=50))["label"]) == 50
