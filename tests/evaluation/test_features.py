"""Features of images do not depend on batches."""

import jax
import numpy as np
import pytest

from bitgen.errors import UserError
from bitgen.evaluation.features import PROTOCOLS, Extractor
from bitgen.runtime.mesh import make_mesh


def test_features_do_not_depend_on_the_batch_and_no_image_is_dropped():
    network = PROTOCOLS["random"].network
    params = network.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))["params"]
    extractor = Extractor("random", params, make_mesh(), 12)
    assert extractor.rows == 16  # what 8 devices divide
    images = np.random.default_rng(0).integers(0, 256, (37, 20, 24, 3), np.uint8)
    batches = [images[:5], images[5:30], images[30:]]
    features = list(extractor.stream(batches))
    assert [len(f["pool"]) for f in features] == [16, 16, 5]
    one = extractor(images[36:])
    for name, values in one.items():
        together = np.concatenate([f[name] for f in features])
        assert len(together) == 37
        np.testing.assert_allclose(together[36:], values, rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="different sizes"):
        list(extractor.stream([images[:16], images[16:32, :10]]))
    with pytest.raises(UserError, match="uint8"):
        extractor(images.astype(np.float32))
