"""Data worker processes that die."""

import logging
import multiprocessing
import os
import signal

import numpy as np
import pytest
from helpers import small

from bitgen import data
from bitgen.errors import UserError


def worker_batches():
    c = small.tokenizer().data
    c.workers = 1
    return data.make_batches(c, batch_size=8, seed=0, training=True)


def kill_workers():
    for child in multiprocessing.active_children():
        if child.pid:
            os.kill(child.pid, signal.SIGKILL)


@pytest.mark.slow
def test_a_data_worker_that_dies_is_started_again_and_nothing_is_lost(caplog):
    c = small.tokenizer().data
    plain = data.make_batches(c, batch_size=8, seed=0, training=True)
    expected = [next(plain)["image"] for _ in range(60)]
    plain.close()
    batches = worker_batches()
    with caplog.at_level(logging.WARNING):
        for i, images in enumerate(expected):
            if i == 3:
                kill_workers()
            np.testing.assert_array_equal(next(batches)["image"], images)
    batches.close()
    assert "a data worker process died (killed, as for lack of memory): started again" in (
        caplog.text
    )


def test_a_data_worker_that_dies_again_is_one_clear_error(monkeypatch):
    batches = worker_batches()

    class Dying:
        def __next__(self):
            raise RuntimeError("Worker process was terminated unexpectedly with exit code -9.")

        def close(self):
            pass

    monkeypatch.setattr(batches, "_pipeline", Dying)
    with pytest.raises(UserError, match=r"worker process died twice at example 0 \(killed"):
        next(batches)
    batches.close()
