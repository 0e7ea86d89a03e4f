"""Sets of features, parts of them, and what networks do not take."""

import numpy as np
import pytest

from diffusion.evaluation.networks.network import Network, pixels
from diffusion.evaluation.sets import of_arrays


def test_a_subset_keeps_features_beside_their_subjects():
    whole = of_arrays("x", {"features": np.arange(2500)[:, None]}, list(range(2500)))
    index = np.array([3, 999, 1000, 2499])
    part = whole.subset(index)
    np.testing.assert_array_equal(part.array()[:, 0], index)
    assert list(part.subjects) == index.tolist()
    for wrong in ([2000, 5], [4, 4], [-1, 3], [2500], []):
        with pytest.raises(ValueError, match="ascending indices below 2500"):
            whole.subset(np.array(wrong, int))


def test_networks_refuse_what_they_would_misread():
    pictures = Network("net", lambda: lambda x, _: {"features": x.reshape(len(x), -1)})
    with pytest.raises(ValueError, match="uint8 or floats, got int64"):
        pictures(np.full((1, 2, 2, 3), 200, np.int64), [None])
    with pytest.raises(ValueError, match="one example at least"):
        pixels()(np.zeros((0, 2)), [])
