"""What the tests of metrics share."""

import numpy as np
import pytest
from helpers.synthetic import GOLDENS


@pytest.fixture(scope="session")
def golden():
    """Features of a reference and of samples, and what ADM's suite makes of them."""
    with np.load(GOLDENS / "metrics_adm.npz") as arrays:
        return dict(arrays)
