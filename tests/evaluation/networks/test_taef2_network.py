"""TAEF2's features: what they contain, and how they order damaged and fresh real pictures."""

import io
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from diffusion.evaluation.metrics.frechet import frechet_distance
from diffusion.evaluation.networks.taef2 import taef2

DATA = Path(__file__).parents[4] / "shared/data"
pytestmark = pytest.mark.skipif(
    not (DATA / "weights/taef2.safetensors").exists() or not (DATA / "cifar10").is_dir(),
    reason="TAEF2's weights or CIFAR-10 are not here",
)
HALF = 32


@pytest.fixture(scope="module")
def network():
    return taef2(str(DATA / "weights/taef2.safetensors"), 32)


@pytest.fixture(scope="module")
def pictures():
    stored = np.load(DATA / "cifar10/cifar10_jpegq75.npz")
    bounds, bytes_ = stored["test_offsets"], stored["test_jpeg"]
    files = [bytes_[a:b].tobytes() for a, b in pairwise(bounds[: 2 * HALF + 1])]
    return np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])


def blurred(x, radius):
    blur = ImageFilter.GaussianBlur(radius)
    return np.stack([np.asarray(Image.fromarray(one).filter(blur)) for one in x])


def noised(x, deviation):
    noise = np.random.default_rng(0).normal(0, deviation, x.shape)
    return (x + noise).round().clip(0, 255).astype(np.uint8)


def test_damage_is_farther_from_real_pictures_than_fresh_ones(network, pictures):
    real, fresh = pictures[:HALF], pictures[HALF:]
    sets = [real, fresh, blurred(fresh, 1), blurred(fresh, 2), noised(fresh, 15), noised(fresh, 40)]
    first, *others = (network(x, [None] * HALF)["features"] for x in sets)
    distances = [frechet_distance(features, first) for features in others]
    fresh, blur, more_blur, noise, more_noise = distances
    assert fresh < blur < more_blur
    assert fresh < noise < more_noise


def test_features_see_where_things_lie_and_not_the_size_of_pictures(network):
    x = np.full((1, 32, 32, 3), 40, np.uint8)
    x[:, :10, :10] = 220
    larger = np.repeat(np.repeat(x, 2, axis=1), 2, axis=2)
    own, size, place = (network(a, [None])["features"][0] for a in (x, larger, x[:, :, ::-1]))
    assert own.shape == (672,)
    moved = np.linalg.norm(place - own)
    assert np.linalg.norm(size - own) < 0.25 * moved
    assert moved > 1


def test_another_size_has_another_name():
    weights = str(DATA / "weights/taef2.safetensors")
    assert taef2(weights, 128).name == "taef2_128"
    with pytest.raises(ValueError, match="multiple of 16, such as 96"):
        taef2(weights, 100)
    with pytest.raises(ValueError, match="no file 'nowhere'"):
        taef2("nowhere")
