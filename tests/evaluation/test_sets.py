"""Sets of features, parts of them, and what networks do not take."""

import numpy as np
import pytest

from diffusion.evaluation import references
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


def test_pictures_of_a_reference_are_seen_once(tmp_path):
    path, seen = tmp_path / "reference.npz", []
    np.savez(path, arr_0=np.arange(2 * 96, dtype=np.uint8).reshape(2, 4, 4, 6)[..., :3])

    def run(x, _):
        seen.append(len(x))
        return {"features": x.reshape(len(x), -1)}

    real = references.read(str(path), Network("net", lambda: run))
    np.testing.assert_array_equal(real.array(), real.array())
    real.moments()
    assert len(seen) == 1
