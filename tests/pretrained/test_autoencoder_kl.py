"""Against diffusers' AutoencoderKL: outputs, names, shapes, configs."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from diffusion.models.autoencoder import AutoencoderKL
from diffusion.pretrained.names import from_tensors, to_tensors
from diffusion.pretrained.networks import autoencoder_kl

torch.set_num_threads(1)

SMALL = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
TWO = {
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
}
CASES = {
    "sd": {**SMALL, **TWO, "layers_per_block": 2, "sample_size": 16},
    "sd3": {
        **{**SMALL, **TWO, "latent_channels": 16, "use_quant_conv": False},
        **{"use_post_quant_conv": False, "scaling_factor": 1.5305, "shift_factor": 0.0609},
    },
    "sdxl, no attention": {
        **{**SMALL, **TWO, "mid_block_add_attention": False, "in_channels": 4, "out_channels": 1},
        **{"latents_mean": (-1.6, 2.2, -0.1, 0.5), "latents_std": (8.4, 5.9, 6.5, 5.8)},
        "scaling_factor": 0.13025,
    },
    "attention at a level": {
        **{**SMALL, "block_out_channels": (16, 16, 24), "layers_per_block": 1},
        "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        "up_block_types": ("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        "use_post_quant_conv": False,
    },
}
FOUR = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
}
PUBLISHED = {
    "Stable Diffusion": (FOUR, 83_653_863, 248),
    "Stable Diffusion 3": (
        {
            **{**FOUR, "latent_channels": 16, "use_quant_conv": False},
            "use_post_quant_conv": False,
        },
        83_819_683,
        244,
    ),
    "x4 upscaler": (
        {
            **{**FOUR, "block_out_channels": (128, 256, 512)},
            "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3,
        },
        55_325_927,
        204,
    ),
}


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Every parameter random, outputs of order one."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.data = noise / parameter[0].numel() ** 0.5
        else:
            parameter.data = 0.3 * noise + float(parameter.data.mean() == 1)  # norms' weights
    return model.eval()


def shapes(net: AutoencoderKL) -> dict:
    variables = jax.eval_shape(net.init, jax.random.key(0), *autoencoder_kl.example(net))
    return variables["params"]


def channels_last(x: torch.Tensor) -> np.ndarray:
    return np.moveaxis(x.numpy(), 1, -1)


@pytest.mark.parametrize("case", CASES)
def test_outputs_names_and_config_are_those_of_diffusers(case):
    model = randomised(diffusers.AutoencoderKL(**CASES[case]))
    net = autoencoder_kl.from_config(model.config)
    tensors = model.state_dict()
    names = autoencoder_kl.names(net)
    params = from_tensors(names, shapes(net), tensors)
    x = torch.randn((2, net.in_channels, 8, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model.encode(x).latent_dist
        decoded = model.decode(wanted.mean).sample

    def both(params, x):
        latents = net.apply({"params": params}, x, method=net.encode)
        return latents, net.apply({"params": params}, latents.mean, method=net.decode)

    latents, image = jax.jit(both)(params, channels_last(x))
    assert 0.1 < wanted.mean.std() < 10 and 0.1 < decoded.std() < 10
    np.testing.assert_allclose(latents.mean, channels_last(wanted.mean), atol=1e-4)
    np.testing.assert_allclose(latents.log_variance, channels_last(wanted.logvar), atol=1e-4)
    np.testing.assert_allclose(image, channels_last(decoded), atol=1e-4)

    written = dict(to_tensors(names, params))
    assert written.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(written[key], value, err_msg=key)

    config = autoencoder_kl.to_config(net)
    assert autoencoder_kl.from_config(config) == net
    theirs = diffusers.AutoencoderKL.from_config(config).config
    ignored = {"act_fn", "_use_default_values", "_class_name"}
    assert {k: v for k, v in theirs.items() if k not in ignored} == {
        k: v for k, v in {**model.config, **config}.items() if k not in ignored
    }


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    config, parameters, tensors = PUBLISHED[name]
    net = autoencoder_kl.from_config(config)
    ours = shapes(net)
    assert sum(p.size for p in jax.tree.leaves(ours)) == parameters
    with torch.device("meta"):
        theirs = diffusers.AutoencoderKL(**config).state_dict()
    hollow = jax.tree.map(lambda p: np.broadcast_to(np.int8(0), p.shape), ours)
    written = {k: np.shape(v) for k, v in to_tensors(autoencoder_kl.names(net), hollow)}
    assert len(written) == tensors
    assert written == {k: tuple(v.shape) for k, v in theirs.items()}


def test_old_attention_names_are_read():
    net = autoencoder_kl.from_config(CASES["sd"])
    params = jax.tree.map(lambda p: np.random.default_rng(0).normal(size=p.shape), shapes(net))
    names = autoencoder_kl.names(net)
    written = dict(to_tensors(names, params))
    old = {}
    for key, value in written.items():
        for former, now in (("query", "to_q"), ("key", "to_k"), ("value", "to_v")):
            key = key.replace(f".{now}.", f".{former}.")
        key = key.replace(".to_out.0.", ".proj_attn.")
        old[key] = value
    assert len(old.keys() - written.keys()) == 16
    read = from_tensors(names, params, old)
    jax.tree.map(np.testing.assert_array_equal, read, params)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"act_fn": "relu"}, "act_fn='relu': .* 'silu'"),
        ({"latent_chanels": 8}, "latent_chanels=8: .* did you mean 'latent_channels'"),
        ({"down_block_types": ["DownBlock2D"] * 2}, "down_block_types: .* got 'DownBlock2D'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "up_block_types=.* reversed"),
        ({"block_out_channels": [16]}, "block_out_channels=.* expected 2 entries"),
        ({"sample_size": [16, 8]}, "sample_size=.*square"),
        ({"latents_mean": [0.0]}, "latents_mean=.* expected 4"),
        ({"norm_num_groups": 5}, "norm_groups=5 .* nearest: 4"),
    ],
)
def test_unsupported_configs_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        autoencoder_kl.from_config({**CASES["sd"], **change})


def test_half_precision():
    net = autoencoder_kl.from_config(CASES["sd"])
    low = net.clone(dtype=jnp.bfloat16)
    half = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.bfloat16), shapes(net))
    out, latents = jax.eval_shape(low.apply, {"params": half}, *autoencoder_kl.example(net))
    assert (out.dtype, latents.mean.dtype) == (jnp.bfloat16, jnp.float32)
    assert low.computation == jnp.bfloat16
    assert net.clone(dtype=jnp.float16).computation == jnp.float32
    assert net.clone(dtype=jnp.float16, force_upcast=False).computation == jnp.float16
