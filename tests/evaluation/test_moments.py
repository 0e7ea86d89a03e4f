"""Moments chunk by chunk are those of all features, also where float32 or plain sums fail."""

import numpy as np
import pytest

from diffusion.evaluation.moments import moments


@pytest.mark.parametrize("sizes", [(50,), (1,) * 50, (7, 30, 13), (49, 1)])
def test_chunks_do_not_matter(sizes, monkeypatch):
    monkeypatch.setattr("diffusion.evaluation.moments.ROWS", 10)
    x = np.random.default_rng(0).standard_normal((50, 6)) * np.arange(1, 7) + 3
    found = moments(np.split(x, np.cumsum(sizes)[:-1]))
    assert found.count == 50
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.cov, np.cov(x.T), rtol=1e-10, atol=1e-12)


def test_far_from_zero_nothing_cancels():
    x = np.random.default_rng(0).standard_normal((1000, 3))
    found = moments([(x + 1e7)[i : i + 100] for i in range(0, 1000, 100)])
    np.testing.assert_allclose(found.cov, np.cov(x.T), rtol=1e-6)


def test_what_has_no_moments():
    assert moments([np.ones((1, 2, 2))]).cov.shape == (4, 4)  # of one example they are 0
    for chunks, message in [
        ([], "at least one example"),
        ([np.zeros((0, 3))], "at least one example"),
        ([np.zeros((2, 3)), np.zeros((2, 4))], "differ in size: 3 and 4"),
        ([np.zeros((600, 3)), np.zeros((2, 4))], "differ in size: 3 and 4"),
        ([np.array([[1.0, np.inf]])], "NaN or infinity"),
        ([np.zeros((2, 64, 64, 12))], "49,152 features, whose covariance takes 18 GiB"),
    ]:
        with pytest.raises(ValueError, match=message):
            moments(chunks)


def test_small_chunks_are_summed_together(monkeypatch):
    """One product for many, or else 50,000 chunks of one take half an hour."""
    products, outer = [], np.outer
    monkeypatch.setattr(np, "outer", lambda a, b: products.append(1) or outer(a, b))
    moments(np.ones((2000, 1, 4)))
    assert len(products) == 3
