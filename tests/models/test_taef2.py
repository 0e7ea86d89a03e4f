from pathlib import Path

import jax
import numpy as np
import pytest

from diffusion.models.taef2 import TAEF2
from diffusion.pretrained.networks import taef2

WEIGHTS = Path(__file__).parents[3] / "shared/data/weights"
real = pytest.mark.skipif(
    not (WEIGHTS / "taef2.safetensors").exists(), reason="TAEF2's weights are not here"
)


@real
def test_real_weights_reproduce_the_published_latents_and_pictures():
    params = taef2.load(WEIGHTS / "taef2.safetensors")
    oracle = np.load(WEIGHTS / "taef2_oracle.npz")
    x = oracle["image_uint8_nhwc"] / np.float32(127.5) - 1
    latents = TAEF2().apply({"params": params}, x, method="encode")
    decoded = TAEF2().apply({"params": params}, latents, method="decode") / 2 + 0.5
    expected = np.moveaxis(oracle["latents_nchw"], 1, -1)
    np.testing.assert_allclose(latents, expected, atol=2e-4)
    np.testing.assert_allclose(decoded, np.moveaxis(oracle["decoded_nchw"], 1, -1), atol=2e-4)
    # By the table of layers: convolutions without and with bias, blocks, wide blocks.
    down = 9 * 64 * 64
    block = 3 * (down + 64)
    wide = block + 2 * 64 * 256 + 2 * 256
    both = 3 * down + 7 * block + 3 * wide
    ends = [(3, 64), (64, 32), (32, 64), (64, 3)]
    count = 2 * both + sum(9 * i * o + o for i, o in ends)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


def test_stages_halve_the_picture_and_end_in_the_latents():
    net, x = TAEF2(width=8, latent_channels=4), np.zeros((2, 16, 24, 3), np.float32)
    params = net.init(jax.random.key(0), x)["params"]
    stages = net.apply({"params": params}, x, method="stages")
    sides = [(16, 24), (8, 12), (4, 6), (2, 3), (2, 3)]
    assert [stage.shape[1:3] for stage in stages] == sides
    assert stages[-1].shape == (2, 2, 3, 4)
    assert net.apply({"params": params}, x).shape == x.shape
    with pytest.raises(ValueError, match="multiples of 8"):
        net.apply({"params": params}, x[:, :12], method="encode")


def test_a_file_of_half_the_network_is_refused(tmp_path):
    from diffusion.pretrained import files

    tensor = files.of_array(np.zeros((64, 3, 3, 3), np.float32))
    files.write_file(tmp_path / "half.safetensors", {"encoder.0.weight": tensor})
    with pytest.raises(ValueError, match="does not hold this model"):
        taef2.load(tmp_path / "half.safetensors")
