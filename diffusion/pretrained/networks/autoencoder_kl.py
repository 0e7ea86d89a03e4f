"""diffusers' ``AutoencoderKL``: Stable Diffusion 1, 2, XL and 3, x4 upscaler, kl-f4 to kl-f32."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from diffusion.models.autoencoder import AutoencoderKL
from diffusion.pretrained import fields
from diffusion.pretrained.names import FORMER_ATTENTION, Names, dotted

FIELDS = {
    "widths": ("block_out_channels", (64,)),
    "blocks": ("layers_per_block", 1),
    "in_channels": ("in_channels", 3),
    "out_channels": ("out_channels", 3),
    "latent_channels": ("latent_channels", 4),
    "mid_attention": ("mid_block_add_attention", True),
    "quant_conv": ("use_quant_conv", True),
    "post_quant_conv": ("use_post_quant_conv", True),
    "norm_groups": ("norm_num_groups", 32),
    "scaling_factor": ("scaling_factor", 0.18215),
    "latents_mean": ("latents_mean", None),
    "latents_std": ("latents_std", None),
    "force_upcast": ("force_upcast", True),
}
DEFAULTS = {
    **fields.defaults(FIELDS),
    "down_block_types": ("DownEncoderBlock2D",),
    "up_block_types": ("UpDecoderBlock2D",),
    "sample_size": 32,
    "shift_factor": None,
}
SUPPORTED = {"act_fn": ("silu", "swish")}
DOWN = {False: "DownEncoderBlock2D", True: "AttnDownEncoderBlock2D"}
UP = {False: "UpDecoderBlock2D", True: "AttnUpDecoderBlock2D"}


def from_config(config: Mapping[str, Any]) -> AutoencoderKL:
    """The module of a ``config.json``."""
    given = fields.fields(config, "AutoencoderKL", DEFAULTS, SUPPORTED)
    attention = tuple(fields.kinds(given, "down_block_types", "AutoencoderKL", DOWN))
    up = fields.kinds(given, "up_block_types", "AutoencoderKL", UP)
    if attention != tuple(reversed(up)):
        raise ValueError(
            f"up_block_types={given.up_block_types}: AutoencoderKL is supported with attention at "
            f"the same levels as in down_block_types={given.down_block_types}, reversed"
        )
    if len(given.block_out_channels) != len(attention):
        raise ValueError(
            f"block_out_channels={given.block_out_channels}: expected {len(attention)} entries, "
            f"as many as down_block_types={given.down_block_types}"
        )
    return AutoencoderKL(
        attention=attention if any(attention) else False,
        shift_factor=given.shift_factor or 0.0,
        sample_size=fields.side(given, "sample_size", "AutoencoderKL"),
        **fields.ours(FIELDS, given),
    )


def to_config(net: AutoencoderKL) -> dict[str, Any]:
    """The ``config.json`` from which diffusers builds the same network."""
    levels = len(net.widths)
    given = net.attention if isinstance(net.attention, tuple) else (net.attention,) * levels
    return {
        "_class_name": "AutoencoderKL",
        "down_block_types": [DOWN[attends] for attends in given],
        "up_block_types": [UP[attends] for attends in reversed(given)],
        "act_fn": "silu",
        "sample_size": net.sample_size,
        "shift_factor": net.shift_factor or None,
        **fields.theirs(FIELDS, net),
    }


def names(net: AutoencoderKL) -> Names:
    """The name table; older files' names of the attention layers are read, too."""
    return Names(dotted(), aliases=FORMER_ATTENTION)


def example(net: AutoencoderKL) -> tuple[jax.ShapeDtypeStruct]:
    """The arguments of ``net.init``, by shape."""
    return (fields.array(net.factor, net.factor, net.in_channels),)
