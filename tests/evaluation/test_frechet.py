"""Distances between sets of features, and the statistics they come from, against ADM's numbers."""

import numpy as np
import pytest
from helpers.synthetic import GOLDENS

from bitgen.errors import UserError
from bitgen.evaluation import statistics
from bitgen.evaluation.frechet import frechet_distance, kernel_distance
from bitgen.evaluation.precision_recall import precision_recall
from bitgen.evaluation.statistics import (
    Gaussian,
    Moments,
    Scores,
    Summary,
    read_statistics,
    summarise,
    write_statistics,
)


@pytest.fixture(scope="module")
def golden():
    """Features of a reference and of samples, and what ADM's suite makes of them."""
    with np.load(GOLDENS / "metrics_adm.npz") as arrays:
        return dict(arrays)


def gaussian(rows, batches=1) -> Gaussian:
    moments = Moments(rows.shape[1])
    for batch in np.array_split(rows, batches):
        moments.add(batch)
    return moments.gaussian()


def test_fid_is_adms(golden):
    distance = frechet_distance(gaussian(golden["ref_acts"]), gaussian(golden["sample_acts"]))
    assert distance == pytest.approx(float(golden["fid"]), rel=1e-6)


@pytest.mark.parametrize("split", [5000, 250])
@pytest.mark.parametrize("batch", [1000, 77])
def test_inception_score_is_adms(golden, split, batch):
    logits, scores = np.log(golden["softmax"]) + 3.0, Scores()
    for start in range(0, len(logits), batch):
        part = logits[start : start + batch]
        scores.add(part, (start + np.arange(len(part))) // split)
    assert scores.value() == pytest.approx(float(golden[f"inception_score_split{split}"]), rel=1e-6)


@pytest.mark.parametrize("block", [2048, 64, 450])
def test_precision_and_recall_are_adms_in_blocks_of_any_size(golden, block):
    found = precision_recall(golden["ref_acts"], golden["sample_acts"], block=block)
    assert found == (golden["precision"][0], golden["recall"][0])


def test_blocks_find_what_all_distances_at_once_find():
    generator = np.random.default_rng(0)
    a, b = generator.normal(size=(131, 6)), 1.1 * generator.normal(size=(97, 6)) + 0.3
    a[5] = a[77]  # equal features have radius 0 to each other, and are the nearest

    def distances(x, y):
        return np.square(x[:, None] - y[None]).sum(-1)

    radii = [np.sort(distances(x, x), axis=1)[:, 3] for x in (a, b)]
    between = distances(a, b)
    precision = (between <= radii[0][:, None]).any(0).mean()
    recall = (between <= radii[1][None]).any(1).mean()
    assert 0 < recall < 1
    for block in (50, 500):
        assert precision_recall(a, b, block=block) == (precision, recall)
    assert precision_recall(b, a, block=50) == (recall, precision)
    assert precision_recall(a, a) == (1, 1)
    assert precision_recall(a, a + 100) == (0, 0)


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


def test_fid_is_the_root_of_the_product_also_without_full_rank():
    from scipy.linalg import sqrtm

    generator = np.random.default_rng(1)
    a, b = (generator.normal(size=(200, 40)) @ generator.normal(size=(40, 40)) for _ in range(2))
    p, q = gaussian(a), gaussian(b)
    root = np.trace(sqrtm(p.covariance @ q.covariance)).real
    expected = np.square(p.mean - q.mean).sum() + np.trace(p.covariance + q.covariance) - 2 * root
    assert frechet_distance(p, q) == pytest.approx(expected, rel=1e-9)
    few = gaussian(a[:5])
    assert frechet_distance(few, few) == pytest.approx(0, abs=1e-9)
    # Along one direction the distance is known: (s - t)^2.
    s, t = np.zeros((3, 3)), np.zeros((3, 3))
    s[0, 0], t[0, 0] = 4, 9
    zero = np.zeros(3)
    assert frechet_distance(Gaussian(zero, s), Gaussian(zero, t)) == pytest.approx(1, rel=1e-12)


def test_kid_is_the_unbiased_estimate():
    generator = np.random.default_rng(2)
    a, b = generator.normal(size=(12, 4)), generator.normal(size=(12, 4)) + 0.5

    def kernel(x, y):
        return (x @ y / 4 + 1) ** 3

    n = len(a)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    own = sum(kernel(a[i], a[j]) + kernel(b[i], b[j]) for i, j in pairs if i != j)
    expected = own / (n * (n - 1)) - 2 * sum(kernel(a[i], b[j]) for i, j in pairs) / n**2
    mean, deviation = kernel_distance(a, b, subsets=3)
    assert mean == pytest.approx(expected, rel=1e-9)
    assert deviation == pytest.approx(0, abs=1e-9)  # every subset is all rows
    assert kernel_distance(a, b, size=6)[1] > 0


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


def test_errors_say_what_does_not_fit(tmp_path):
    with pytest.raises(UserError, match="no reference"):
        read_statistics(tmp_path / "none.npz", "adm", "")
    (tmp_path / "bad.npz").write_bytes(b"no zip file at all")
    with pytest.raises(UserError, match="not an npz file"):
        read_statistics(tmp_path / "bad.npz", "adm", "")
    np.savez(tmp_path / "odd.npz", mu=np.zeros(3), sigma=np.eye(4))
    with pytest.raises(UserError, match=r"mu \[3\] does not fit \[4, 4\]"):
        read_statistics(tmp_path / "odd.npz", "adm", "")
    three, four = (Gaussian(np.zeros(n), np.eye(n)) for n in (3, 4))
    with pytest.raises(UserError, match="different sizes, 3 and 4"):
        frechet_distance(three, four)
    with pytest.raises(UserError, match="NaN"):
        frechet_distance(three, Gaussian(np.full(3, np.nan), np.eye(3)))
    rows = np.zeros((3, 4), np.float32)
    with pytest.raises(UserError, match="more than 3 images"):
        precision_recall(rows, rows)
    with pytest.raises(UserError, match="different sizes, 4 and 3"):
        precision_recall(rows, rows[:, :3])
    with pytest.raises(UserError, match="different sizes"):
        kernel_distance(rows, rows[:, :3])
    with pytest.raises(UserError, match="two images"):
        gaussian(rows[:1])
    with pytest.raises(UserError, match="two images"):
        summarise([], 0)
