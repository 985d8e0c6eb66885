"""Packed bits: the bytes, the folder, and going on after a kill."""

import json
import pickle

import jax
import numpy as np
import pytest

from bitgen.data import PackedSource, PackedWriter, pack_bits, unpack_bits
from bitgen.errors import UserError

META = {
    "grid": (2, 3),
    "bits": 12,
    "views": 2,
    "num_classes": 4,
    "class_names": ["a", "b", "c", "d"],
    "count": 10,
    "examples_per_shard": 4,
    "tokenizer": {"name": "tiny"},
    "source": {"path": "images"},
}


def examples(n: int = 10, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2, (n, 2, 2, 3, 12)).astype(bool)
    return pack_bits(bits), (np.arange(n) % 4).astype(np.int32)


def write_all(directory, meta=META) -> tuple[np.ndarray, np.ndarray]:
    packed, labels = examples(meta["count"])
    writer = PackedWriter(directory, meta)
    writer.add(packed, labels)
    writer.finish()
    return packed, labels


@pytest.mark.parametrize("k", [1, 7, 8, 12, 16, 32, 64])
def test_bits_survive_packing_and_numpy_agrees_with_jax(k):
    bits = np.random.default_rng(k).integers(0, 2, (2, 3, k)).astype(bool)
    packed = pack_bits(bits)
    assert (packed.shape, packed.dtype) == ((2, 3, -(-k // 8)), np.uint8)
    np.testing.assert_array_equal(unpack_bits(packed, k), bits)
    on_device = jax.jit(pack_bits)(bits)
    np.testing.assert_array_equal(on_device, packed)
    unpacked = jax.jit(unpack_bits, static_argnums=1)(on_device, k)
    assert unpacked.dtype == bool
    np.testing.assert_array_equal(unpacked, bits)


def test_the_first_bit_is_the_highest_of_the_byte():
    bits = np.zeros(12, bool)
    bits[[0, 9]] = True
    assert pack_bits(bits).tolist() == [0b1000_0000, 0b0100_0000]


def test_unpack_refuses_bytes_of_another_k():
    with pytest.raises(UserError, match=r"24 bits are packed in 3 bytes, got 2"):
        unpack_bits(np.zeros((5, 2), np.uint8), 24)


def test_what_was_written_is_read_back_from_memory_maps(tmp_path):
    packed, labels = write_all(tmp_path / "bits")
    source = PackedSource(tmp_path / "bits")
    assert (len(source), source.num_classes, source.class_names) == (10, 4, META["class_names"])
    assert source.meta["shard_sizes"] == [4, 4, 2]
    assert source.meta["tokenizer"] == {"name": "tiny"}
    assert all(isinstance(shard, np.memmap) for shard in source._bits)
    for copy in (source, pickle.loads(pickle.dumps(source))):
        for i in range(10):
            np.testing.assert_array_equal(copy[i]["bits"], packed[i])
            assert copy[i]["label"] == labels[i]


def test_pickling_sends_the_path_and_not_the_bits(tmp_path):
    write_all(tmp_path, {**META, "count": 4000, "examples_per_shard": 4000})
    assert len(pickle.dumps(PackedSource(tmp_path))) < 1000


def test_a_killed_writer_goes_on_at_the_first_missing_shard(tmp_path):
    packed, labels = examples()
    writer = PackedWriter(tmp_path, META)
    for i in range(0, 6, 2):  # one whole shard, and two examples that are lost
        writer.add(packed[i : i + 2], labels[i : i + 2])
    # Killed while shard 1 was being written: labels in place, bits half written.
    np.save(tmp_path / "labels-00001.npy", labels[4:8])
    (tmp_path / ".bits-00001.npy.7.part").write_bytes(b"half")
    with pytest.raises(UserError, match="is not finished; run --mode=tokenize again"):
        PackedSource(tmp_path)

    first = (tmp_path / "bits-00000.npy").stat().st_mtime_ns
    writer = PackedWriter(tmp_path, META)
    assert writer.next_index == 4
    writer.add(packed[4:], labels[4:])
    assert writer.next_index == 8  # the last shard is not full, so it waits for finish
    writer.finish()
    assert (writer.next_index, writer.complete) == (10, True)
    assert (tmp_path / "bits-00000.npy").stat().st_mtime_ns == first
    source = PackedSource(tmp_path)
    np.testing.assert_array_equal(np.stack([source[i]["bits"] for i in range(10)]), packed)
    assert not list(tmp_path.glob("*.part"))

    again = PackedWriter(tmp_path, META)  # a finished folder stays as it is
    assert (again.next_index, again.complete) == (10, True)
    again.finish()


def test_killed_between_the_last_shard_and_the_mark(tmp_path):
    write_all(tmp_path)
    meta = json.loads((tmp_path / "bits.json").read_text())
    (tmp_path / "bits.json").write_text(json.dumps({**meta, "complete": False}))
    writer = PackedWriter(tmp_path, META)
    assert writer.next_index == 10
    writer.finish()
    assert len(PackedSource(tmp_path)) == 10


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("bits", 16, "started with bits=12, now bits=16"),
        ("grid", [3, 2], r"started with grid=\[2, 3\], now grid=\[3, 2\]"),
        ("tokenizer", {"name": "other"}, 'now tokenizer={"name": "other"}'),
        ("count", 11, "started with count=10, now count=11"),
        ("examples_per_shard", 5, "now examples_per_shard=5"),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_another_meta_is_refused_by_the_name_of_its_key(tmp_path, key, value, message, finished):
    if finished:
        write_all(tmp_path)
    else:
        PackedWriter(tmp_path, META)
    with pytest.raises(UserError, match=message):
        PackedWriter(tmp_path, {**META, key: value})


def test_examples_left_out_leave_gaps(tmp_path):
    packed, labels = examples()
    index = np.array([0, 1, 3, 4, 5, 6, 7, 8])  # 2 and 9 cannot be read
    writer = PackedWriter(tmp_path, META)
    writer.add(packed[index[:3]], labels[index[:3]], index[:3])
    assert writer.next_index == 4
    writer.add(packed[index[3:]], labels[index[3:]], index[3:])
    with pytest.raises(UserError, match="2 of 10 examples were not added and only 1 are broken"):
        writer.finish(broken=1)
    writer.finish(broken=2)
    source = PackedSource(tmp_path)
    assert source.meta["shard_sizes"] == [3, 4, 1]
    assert (len(source), source.meta["count"]) == (8, 8)
    np.testing.assert_array_equal(np.stack([source[i]["bits"] for i in range(8)]), packed[index])
    assert PackedWriter(tmp_path, META).complete  # same settings: nothing left to do


def test_finish_refuses_a_run_that_stopped_early(tmp_path):
    packed, labels = examples()
    writer = PackedWriter(tmp_path, META)
    writer.add(packed[:9], labels[:9])
    with pytest.raises(UserError, match="1 of 10 examples were not added"):
        writer.finish()
    with pytest.raises(UserError, match="is not finished"):
        PackedSource(tmp_path)


def test_add_refuses_what_does_not_fit(tmp_path):
    packed, labels = examples()
    writer = PackedWriter(tmp_path, META)
    with pytest.raises(UserError, match=r"takes uint8 \[b, 2, 2, 3, 2\], got uint8 \[10, 1, "):
        writer.add(packed[:, :1], labels)
    with pytest.raises(UserError, match="10 packed bits with 9 labels"):
        writer.add(packed, labels[:9])
    with pytest.raises(UserError, match=r"labels are 0 to 7, .* has 4 classes"):
        writer.add(packed, labels + 4 * (labels == 3))
    with pytest.raises(UserError, match="continues at example 0 of 10, in order; got 5 to 4"):
        writer.add(packed[:2], labels[:2], np.array([5, 4]))
    writer.add(packed[:6], labels[:6])
    with pytest.raises(UserError, match="continues at example 6 of 10"):
        writer.add(packed[:6], labels[:6], np.arange(6))
    with pytest.raises(UserError, match="continues at example 6 of 10"):
        writer.add(packed[:5], labels[:5])


def test_bad_meta_and_bad_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"wrong: \['views'\]"):
        PackedWriter(tmp_path / "a", {k: v for k, v in META.items() if k != "views"})
    with pytest.raises(UserError, match="examples_per_shard >= 1, got 0"):
        PackedWriter(tmp_path / "a", {**META, "examples_per_shard": 0})
    assert not (tmp_path / "a").exists()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is not empty and has no bits.json"):
        PackedWriter(tmp_path / "b", META)
    with pytest.raises(UserError, match="is not a folder of bits"):
        PackedSource(tmp_path / "nowhere")


def test_a_damaged_folder_says_which_file(tmp_path):
    write_all(tmp_path)
    shard = tmp_path / "bits-00001.npy"
    whole = shard.read_bytes()
    np.save(shard, np.load(shard)[:3])
    with pytest.raises(UserError, match=r"bits-00001.npy holds \[3, 2, 2, 3, 2\]"):
        PackedSource(tmp_path)
    shard.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"bits-00001.npy is missing or damaged"):
        PackedSource(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"bits-00001.npy is missing or damaged"):
        PackedSource(tmp_path)
    meta = json.loads((tmp_path / "bits.json").read_text())
    (tmp_path / "bits.json").write_text(json.dumps({**meta, "format": 9}))
    with pytest.raises(UserError, match="has format 9, this version reads 1"):
        PackedSource(tmp_path)
    (tmp_path / "bits.json").write_text("{")
    with pytest.raises(UserError, match=r"bits.json is damaged"):
        PackedSource(tmp_path)
