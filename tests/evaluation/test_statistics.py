"""Running statistics, the Inception score, and files of statistics."""

import numpy as np
import pytest
from helpers.arrays import gaussian

from bitgen.errors import UserError
from bitgen.evaluation import statistics
from bitgen.evaluation.frechet import frechet_distance
from bitgen.evaluation.statistics import (
    Scores,
    Summary,
    read_statistics,
    summarise,
    write_statistics,
)


@pytest.mark.parametrize("split", [5000, 250])
@pytest.mark.parametrize("batch", [1000, 77])
def test_inception_score_is_adms(golden, split, batch):
    logits, scores = np.log(golden["softmax"]) + 3.0, Scores()
    for start in range(0, len(logits), batch):
        part = logits[start : start + batch]
        scores.add(part, (start + np.arange(len(part))) // split)
    assert scores.value() == pytest.approx(float(golden[f"inception_score_split{split}"]), rel=1e-6)


@pytest.mark.parametrize("batches", [1, 3, 400])
def test_streaming_is_direct(golden, batches):
    rows = golden["ref_acts"].astype(np.float64) + 1e4  # a sum of squares would lose the digits
    found = gaussian(rows, batches)
    np.testing.assert_allclose(found.mean, rows.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(rows, rowvar=False), atol=1e-8)


def test_scores_of_splits_are_averaged(golden):
    softmax, splits = golden["softmax"], np.arange(1000) // 250
    whole, part = Scores(), Scores()
    for rows in (slice(300, None), slice(300)):  # in any order
        whole.add(np.log(softmax[rows]), splits[rows])
    part.add(np.log(softmax[300:]), splits[300:])
    assert whole.value() == pytest.approx(float(golden["inception_score_split250"]), rel=1e-6)
    assert part.value() != pytest.approx(whole.value(), rel=1e-6)


def test_summary_keeps_every_nth_image_of_any_batches(golden):
    rows = golden["ref_acts"]

    def stream(batch):
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            yield {"pool": part, "spatial": part[:, :5], "logits": part}

    for batch in (400, 7, 64):
        found = summarise(stream(batch), 400, keep_every=30)
        np.testing.assert_array_equal(found.features, rows[::30])
        assert found.count == 400
        assert summarise(stream(batch), 400, keep_every=0).features is None
        np.testing.assert_allclose(found.spatial.covariance, np.cov(rows[:, :5], rowvar=False))


def test_inception_score_of_images_in_order_of_their_class(monkeypatch):
    monkeypatch.setattr(statistics, "SPLIT", 50)
    logits = 20.0 * np.eye(10)[np.repeat(np.arange(10), 20)]  # each is sure of its class

    def stream(rows):
        for part in np.array_split(rows, 7):
            yield {"pool": part, "spatial": part, "logits": part}

    found = summarise(stream(logits), 200)
    assert found.score == pytest.approx(10, rel=1e-3)
    assert found.score_in_order < 4  # a split of 50 images has three classes
    shuffled = summarise(stream(np.random.default_rng(0).permutation(logits)), 200)
    assert shuffled.score == pytest.approx(shuffled.score_in_order, rel=0.1)


def test_statistics_go_to_a_file_of_adms_form_and_back(golden, tmp_path):
    rows = golden["ref_acts"]
    summary = Summary(400, gaussian(rows), gaussian(rows[:, :5]))
    path = tmp_path / "below" / "statistics.npz"
    write_statistics(path, summary, "adm", "d1")
    with np.load(path) as arrays:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(arrays.files)
        assert arrays["sigma"].dtype == np.float64
    assert [p.name for p in path.parent.iterdir()] == ["statistics.npz"]
    back = read_statistics(path, "adm", "d1")
    assert frechet_distance(back.pool, summary.pool) == pytest.approx(0, abs=1e-8)
    assert back.count == 400
    with pytest.raises(UserError, match="of protocol adm, not pytorch_fid"):
        read_statistics(path, "pytorch_fid", "d1")
    with pytest.raises(UserError, match="of other weights, d1"):
        read_statistics(path, "adm", "d2")
    np.savez(tmp_path / "fid.npz", mu=np.zeros(3), sigma=np.eye(3))  # pytorch-fid's
    found = read_statistics(tmp_path / "fid.npz", "pytorch_fid", "d2")
    assert found.spatial is None
    np.savez(tmp_path / "images.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    assert read_statistics(tmp_path / "images.npz", "adm", "d1") is None
