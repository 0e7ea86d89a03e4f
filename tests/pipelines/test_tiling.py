"""Against diffusers' tiling."""

import diffusers
import jax
import numpy as np
import pytest
import torch

from diffusion.models.autoencoder import AutoencoderKL
from diffusion.pipelines import tiles as tiling
from diffusion.pipelines.tiles import Tiling
from diffusion.pretrained.names import from_tensors
from diffusion.pretrained.networks import autoencoder_kl

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def both():
    """diffusers' autoencoder, ours, and the parameters that they share."""
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=8,
        mid_block_add_attention=False,
    ).eval()
    net = autoencoder_kl.from_config(model.config)
    shapes = jax.eval_shape(net.init, jax.random.key(0), *autoencoder_kl.example(net))["params"]
    return model, net, from_tensors(autoencoder_kl.names(net), shapes, model.state_dict())


@pytest.mark.parametrize("overlap, size", [(0.25, (10, 16)), (0.5, (8, 12))])
def test_is_that_of_diffusers(both, overlap, size):
    """On tiles of 8, smaller at the right and at the bottom: 8 x 8, 8 x 4, 4 x 8 and 4 x 4."""
    model, net, params = both
    model.enable_tiling()
    model.tile_overlap_factor = overlap
    x = torch.randn((1, 3, *size), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model.encode(x).latent_dist
        decoded = model.decode(wanted.mean).sample
    latents = tiling.encode(net, params, np.moveaxis(x.numpy(), 1, -1), Tiling(8, overlap))
    image = tiling.decode(net, params, latents.mean, Tiling(8, overlap))
    for ours, theirs in [
        (latents.mean, wanted.mean),
        (latents.log_variance, wanted.logvar),
        (image, decoded),
    ]:
        np.testing.assert_allclose(ours, np.moveaxis(theirs.numpy(), 1, -1), atol=1e-4)


def test_one_tile_is_the_whole(both):
    _, net, params = both
    z = jax.random.normal(jax.random.key(0), (1, 4, 4, 4))
    whole = jax.jit(lambda z: net.apply({"params": params}, z, method="decode"))(z)
    np.testing.assert_allclose(tiling.decode(net, params, z, Tiling(8)), whole, atol=1e-5)


def test_blending_of_equal_tiles_changes_nothing():
    """A function of each pixel alone gives the same in tiles, whatever they overlap."""
    x = np.random.default_rng(0).normal(size=(2, 21, 13, 1))
    for size, overlap in [(8, 0.25), (8, 0.75), (5, 0.0)]:
        out = tiling._tiled(lambda x: {"double": 2 * x}, x, size, size, overlap)["double"]
        np.testing.assert_allclose(out, 2 * x, atol=1e-6)


@pytest.mark.parametrize(
    "tiles, message",
    [
        (Tiling(10, 0.25), "advance by 7 pixels"),
        (Tiling(9), "image size 9"),
        (Tiling(8, 1.0), "overlap=1"),
    ],
)
def test_tiles_that_do_not_fit(tiles, message):
    with pytest.raises(ValueError, match=message):
        tiles.check(AutoencoderKL(widths=(8, 8), norm_groups=4))
