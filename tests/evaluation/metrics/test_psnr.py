"""PSNR."""

import numpy as np
import pytest

from diffusion.evaluation.metrics.psnr import psnr


def test_psnr():
    x = np.zeros((3, 4, 4, 1), np.float32)
    noisy = x + np.float32([0.2, 0.02, 0.0])[:, None, None, None]
    np.testing.assert_allclose(psnr(noisy, x), [20, 40, np.inf], rtol=1e-5)
    np.testing.assert_allclose(psnr(noisy, x, span=1.0)[:2], [13.9794, 33.9794], rtol=1e-5)
    with pytest.raises(ValueError, match="references"):
        psnr(x, x[:1])
