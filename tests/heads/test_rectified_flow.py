"""The rectified-flow head: the times of its chain."""

import numpy as np
import pytest

from bitgen.heads.rectified_flow import flow_times


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_times_of_a_flow_follow_from_their_lengths(steps):
    times, lengths = flow_times(steps)
    assert len(times) == steps + 1
    np.testing.assert_allclose(times[:-1] + lengths, times[1:], atol=1e-6)
    assert (times[0], times[-1]) == (0, np.float32(0.95))
