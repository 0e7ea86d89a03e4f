"""diffusers' ``ControlNetModel``, for Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from diffusion.conditioning import Conditioning
from diffusion.models.controlnet import ControlNet
from diffusion.pretrained import fields as configs
from diffusion.pretrained.names import Names
from diffusion.pretrained.networks import unet, unet_conditional

FIELDS = {
    **{name: unet.FIELDS[name] for name in ("time_cos_first", "time_freq_shift")},
    **{name: unet.FIELDS[name] for name in ("norm_groups", "norm_eps")},
    "widths": ("block_out_channels", (320, 640, 1280, 1280)),
    "in_channels": ("in_channels", 4),
    "hint_widths": ("conditioning_embedding_out_channels", (16, 32, 96, 256)),
    "hint_channels": ("conditioning_channels", 3),
    "global_pool": ("global_pool_conditions", False),
}
DEFAULTS = {
    **unet_conditional.ENCODER_DEFAULTS,
    **configs.defaults(FIELDS),
    "downsample_padding": 1,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
    "layers_per_block": 2,
    "controlnet_conditioning_channel_order": "rgb",
}
SUPPORTED = {
    **unet_conditional.ENCODER_SUPPORTED,
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D"),
    "act_fn": ("silu", "swish"),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1, 0),
    "flip_sin_to_cos": (True, False),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "class_embed_type": (None,),
    "controlnet_conditioning_channel_order": ("rgb", "bgr"),
}
HARMLESS = ("addition_embed_type_num_heads",)  # of an embedding that is not supported


def from_config(config: Mapping[str, Any]) -> ControlNet:
    """The module of a ``config.json``."""
    c = configs.fields(config, "ControlNetModel", DEFAULTS, SUPPORTED, HARMLESS)
    if len(c.down_block_types) != len(c.block_out_channels):
        raise ValueError(
            f"down_block_types={c.down_block_types}: expected {len(c.block_out_channels)} entries, "
            f"as many as block_out_channels={c.block_out_channels}"
        )
    return ControlNet(
        blocks=c.layers_per_block,
        asymmetric_downsampling=c.downsample_padding == 0,
        scale_shift=c.resnet_time_scale_shift == "scale_shift",
        num_classes=c.num_class_embeds,
        null_class=False,
        bgr=c.controlnet_conditioning_channel_order == "bgr",
        **configs.ours(FIELDS, c),
        **unet_conditional.encoder_fields(c),
    )


def to_config(net: ControlNet) -> dict[str, Any]:
    """The ``config.json`` from which diffusers builds the same network.

    Raises:
      ValueError: for a network that diffusers does not have, or that does not know what it is made
        for (``in_channels``, ...).
    """
    unet.known(net, "in_channels")
    for field, usual in {"time_scale": 1, "time_width": None, "guidance_width": None}.items():
        if getattr(net, field) != usual:
            raise ValueError(f"{field}={getattr(net, field)}: ControlNetModel has only {usual}")
    if isinstance(net.blocks, tuple) or net.mid_blocks == 0:
        raise ValueError(
            f"blocks={net.blocks}, mid_blocks={net.mid_blocks}: ControlNetModel has one number of "
            "blocks for all levels, and a mid block"
        )
    return {
        "_class_name": "ControlNetModel",
        **unet_conditional.encoder_config(net),
        **configs.theirs(FIELDS, net),
        "downsample_padding": 0 if net.asymmetric_downsampling else 1,
        "act_fn": "silu",
        "num_class_embeds": net.num_classes and net.num_classes + net.null_class,
        "resnet_time_scale_shift": "scale_shift" if net.scale_shift else "default",
        "controlnet_conditioning_channel_order": "bgr" if net.bgr else "rgb",
    }


def names(net: ControlNet) -> Names:
    """The name table; what a ControlNet shares with a U-Net has the same names."""
    return unet.names(net)


def example(
    net: ControlNet,
) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Conditioning, jax.ShapeDtypeStruct]:
    """The arguments of ``net.init``, by shape."""
    x, time, cond = unet.example(net)
    factor = 2 ** (len(net.hint_widths) - 1)
    hint = configs.array(factor * x.shape[1], factor * x.shape[2], net.hint_channels)
    return x, time, cond, hint
