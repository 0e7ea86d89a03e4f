"""The resizers against their definitions, pixel by pixel in float64, and against Pillow."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from diffusion.evaluation import resize

SHAPES = [(1, 1), (7, 7), (32, 32), (48, 64), (33, 90)]
ALL = (resize.tf_bilinear, resize.torch_bilinear, resize.torch_bicubic, resize.pil_bicubic)


def pictures(shape, count=2):
    return np.random.default_rng(sum(shape)).integers(0, 256, (count, *shape, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", SHAPES)
def test_tf_takes_no_half_pixels(shape):
    x, new = pictures(shape).astype(np.float64), (37, 41)
    expected = np.empty((2, *new, 3))
    for i, j in np.ndindex(new):
        y, z = i * shape[0] / new[0], j * shape[1] / new[1]
        a, b = int(y), int(z)
        below, right = min(a + 1, shape[0] - 1), min(b + 1, shape[1] - 1)
        upper = x[:, a, b] + (x[:, a, right] - x[:, a, b]) * (z - b)
        lower = x[:, below, b] + (x[:, below, right] - x[:, below, b]) * (z - b)
        expected[:, i, j] = upper + (lower - upper) * (y - a)
    np.testing.assert_allclose(resize.tf_bilinear(pictures(shape), new), expected, atol=2e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_torch_is_torch(shape):
    x, new = pictures(shape), (37, 41)
    tensor = torch.from_numpy(x).permute(0, 3, 1, 2).float()
    for ours, options in {
        resize.torch_bilinear: {"mode": "bilinear"},
        resize.torch_bicubic: {"mode": "bicubic", "antialias": True},
    }.items():
        expected = F.interpolate(tensor, new, **options).permute(0, 2, 3, 1)
        np.testing.assert_allclose(ours(x, new), expected, atol=3e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("side", [5, 32, 50])
def test_pillow_is_pillow(shape, side):
    x = pictures(shape)
    for one, own in zip(x, np.asarray(resize.pil_bicubic(x, side))):
        for channel in range(3):
            picture = Image.fromarray(one[..., channel].astype(np.float32))
            expected = np.asarray(picture.resize((side, side), Image.BICUBIC)).clip(0, 255)
            np.testing.assert_allclose(own[..., channel], expected, atol=1e-4)


@pytest.mark.parametrize("function", ALL)
def test_constants_and_equal_sizes_stay(function):
    flat = np.full((1, 9, 20, 3), 201, np.uint8)
    np.testing.assert_allclose(function(flat, (31, 6)), 201, atol=1e-4)
    x = pictures((12, 17))
    np.testing.assert_allclose(function(x, (12, 17)), x, atol=3e-4)
    assert np.asarray(function(x, 5)).dtype == np.float32


def test_floats_are_resized_like_uint8():
    x = pictures((9, 9))
    for function in ALL:
        np.testing.assert_array_equal(function(x, 20), function(x.astype(np.float32), 20))
