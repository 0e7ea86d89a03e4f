"""VGGish against a network of the paper's table in PyTorch, its front end against float64."""

from dataclasses import replace
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import scipy.signal
import torch
from torch import nn

from diffusion.data.sources import Source
from diffusion.evaluation import sample_files, selection
from diffusion.evaluation.harness import Harness
from diffusion.evaluation.metrics.metric import Data, of_array
from diffusion.evaluation.networks.vggish import FEWEST, mel_weights, patches, vggish
from diffusion.models.vggish import VGGish

RNG = np.random.default_rng(0)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Their network, and the file of its weights."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    layers, old = [], 1
    for width in (64, "M", 128, "M", 256, 256, "M", 512, 512, "M"):
        if width == "M":
            layers.append(nn.MaxPool2d(2, 2))
        else:
            layers += [nn.Conv2d(old, width, 3, padding=1), nn.ReLU()]
            old = width
    widths = (512 * 6 * 4, 4096, 4096, 128)
    dense = [part for a, b in pairwise(widths) for part in (nn.Linear(a, b), nn.ReLU())]
    net = nn.ModuleDict({"features": nn.Sequential(*layers), "embeddings": nn.Sequential(*dense)})
    for part in net.features:
        if isinstance(part, nn.Conv2d):
            nn.init.normal_(part.weight, std=(2 / part.weight[0].numel()) ** 0.5)
    path = tmp_path_factory.mktemp("vggish") / "vggish.safetensors"
    pca = {"pproc.pca_means": torch.zeros(128, 1)}
    safetensors.torch.save_file(net.state_dict() | pca, path)

    def run(x):
        with torch.no_grad():
            h = net.features(torch.from_numpy(x)[:, None])
            # Rows, columns, channels, and without the last ReLU.
            return net.embeddings[:-1](h.permute(0, 2, 3, 1).flatten(1)).numpy()

    return run, str(path)


@pytest.fixture(scope="module")
def network(theirs):
    return replace(vggish(theirs[1]), batch=8)


def test_features_are_theirs(theirs, network):
    run, _ = theirs
    x = RNG.uniform(-1, 1, (8, FEWEST + 15_360 + 7)).astype(np.float32)
    found = patches(x)
    assert found.shape == (8, 2, 96, 64)
    expected = run(found.reshape(16, 96, 64)).reshape(8, 2, 128)
    scale = np.abs(expected).max()
    assert np.abs(np.diff(expected, axis=1)).max() > 0.01 * scale
    for shaped in (x, x[..., None]):
        ours = network(shaped, [None] * 8)["features"]
        np.testing.assert_allclose(ours, expected.mean(1), rtol=1e-4, atol=1e-4 * scale)


def test_parameters_are_as_many_as_published():
    patch = jax.ShapeDtypeStruct((1, 96, 64), jnp.float32)
    shapes = jax.eval_shape(VGGish().init, jax.random.key(0), patch)
    assert sum(x.size for x in jax.tree.leaves(shapes)) == 72_141_184


def test_spectrograms_are_those_of_the_definition():
    """Fourier sums written out for some windows, and triangles between corners found one by one."""
    x = RNG.uniform(-1, 1, 2 * FEWEST)
    corners = 700 * (np.exp(np.linspace(*(np.log1p(np.array([125, 7500]) / 700)), 66)) - 1)
    found = patches(x[None])[0].reshape(-1, 64)
    assert len(found) == 96 * 2  # 2 x 15,600 samples have 193 windows, of which 192 fill patches
    hann = scipy.signal.get_window("hann", 400)
    k, n = np.arange(257), np.arange(400)
    for t in (0, 1, 95, 96, 191):
        window = x[160 * t : 160 * t + 400] * hann
        spectrum = np.abs(np.exp(-2j * np.pi * np.outer(k, n) / 512) @ window)
        for band in (0, 1, 30, 63):
            low, centre, high = np.log1p(corners[band : band + 3] / 700)
            total = 0.0
            for f, magnitude in zip(k[1:] * 16_000 / 512, spectrum[1:]):
                m = np.log1p(f / 700)
                if low < m < high:
                    rising = m <= centre
                    total += magnitude * (
                        (m - low) / (centre - low) if rising else (high - m) / (high - centre)
                    )
            assert found[t, band] == pytest.approx(np.log(total + 0.01), rel=1e-6, abs=1e-6)


def test_a_tone_is_in_its_band_and_silence_in_none():
    bands = mel_weights().argmax(1)
    for frequency in (500, 1000, 4000):
        x = np.sin(2 * np.pi * frequency * np.arange(FEWEST) / 16_000)[None]
        loudest = patches(x)[0, 0].mean(0).argmax()
        assert abs(loudest - bands[round(frequency * 512 / 16_000)]) <= 1
    np.testing.assert_allclose(patches(np.zeros((1, FEWEST))), np.log(0.01), rtol=1e-6)


def tones(count, rng):
    t = np.arange(FEWEST) / 16_000
    return np.stack(
        [
            rng.uniform(0.1, 0.9) * np.sin(2 * np.pi * rng.uniform(200, 2000) * t)
            for _ in range(count)
        ]
    ).astype(np.float32)


def test_tones_are_nearer_to_tones_than_noise(theirs, tmp_path):
    rng = np.random.default_rng(1)
    real, fresh = tones(8, rng), tones(8, rng)
    noise = rng.uniform(-0.5, 0.5, (8, FEWEST)).astype(np.float32)
    held_out = Source("tones", 8, real.shape[1:], lambda index: {"x": real[index]})
    judge = Harness(
        selection.make([f'frechet(vggish("{theirs[1]}"), splits=1)'], None),
        None,
        lambda: Data(held_out, held_out),
    )
    far = judge.evaluate(of_array(noise))["fd_vggish"]
    np.savez(tmp_path / "sounds.npz", x=fresh)
    near = judge.evaluate(sample_files.read(str(tmp_path / "sounds.npz")))["fd_vggish"]
    assert 0 < 2 * near < far


def test_what_cannot_be_heard_is_refused():
    with pytest.raises(ValueError, match="of 15600 samples or more at 16 kHz"):
        patches(np.zeros((2, FEWEST - 1)))
    with pytest.raises(ValueError, match="mix several channels"):
        patches(np.zeros((2, FEWEST, 2)))
    with pytest.raises(ValueError, match="up to 30000; divide 16-bit"):
        patches(np.full((2, FEWEST), -30_000.0))
