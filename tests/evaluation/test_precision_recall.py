"""Precision and recall are ADM's."""

import numpy as np
import pytest

from bitgen.evaluation.precision_recall import precision_recall


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
