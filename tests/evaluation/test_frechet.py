"""Fréchet and kernel distances are ADM's."""

import numpy as np
import pytest
from helpers.arrays import gaussian

from bitgen.errors import UserError
from bitgen.evaluation.frechet import frechet_distance, kernel_distance
from bitgen.evaluation.precision_recall import precision_recall
from bitgen.evaluation.statistics import (
    Gaussian,
    read_statistics,
    summarise,
)


def test_fid_is_adms(golden):
    distance = frechet_distance(gaussian(golden["ref_acts"]), gaussian(golden["sample_acts"]))
    assert distance == pytest.approx(float(golden["fid"]), rel=1e-6)


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
