"""diffusers' ``UNet2DModel`` (DDPM, ADM) and ``UNet2DConditionModel`` (Stable Diffusion 1, 2, XL
and its refiner, inpainting, InstructPix2Pix, latent consistency models, the x4 upscaler).

A ``UNet`` that attends to a context is a ``UNet2DConditionModel``, any other one a ``UNet2DModel``.
Our fields list the levels from fine to coarse; diffusers' lists of up blocks have the reverse
order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.conditioning import Conditioning
from diffusion.models.unet import UNet
from diffusion.models.unet_encoder import Encoder
from diffusion.pretrained import fields as configs
from diffusion.pretrained.names import FORMER_ATTENTION, Names, dotted
from diffusion.pretrained.networks import unet_conditional, unet_plain

CLASSES = {"UNet2DModel": unet_plain, "UNet2DConditionModel": unet_conditional}
FIELDS = {
    "time_width": ("time_embedding_dim", None),
    "time_cos_first": ("flip_sin_to_cos", True),
    "time_freq_shift": ("freq_shift", 0),
    "dropout": ("dropout", 0.0),
    "norm_groups": ("norm_num_groups", 32),
    "norm_eps": ("norm_eps", 1e-5),
    "image_size": ("sample_size", None),
}
OWN_FIELDS = {  # each class has its own defaults for these
    "widths": ("block_out_channels", None),
    "in_channels": ("in_channels", None),
    "out_channels": ("out_channels", None),
}
DEFAULTS = {
    **configs.defaults(FIELDS),
    "downsample_padding": 1,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
    "layers_per_block": 2,
}
SUPPORTED = {
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "mid_block_scale_factor": (1,),
    "downsample_padding": (1, 0),
    "flip_sin_to_cos": (True, False),
    "resnet_time_scale_shift": ("default", "scale_shift"),
    "time_embedding_type": ("positional",),
    "class_embed_type": (None,),
}


def from_config(config: Mapping[str, Any]) -> UNet:
    """The module of a ``config.json``."""
    name = configs.architecture(config, CLASSES)
    own = CLASSES[name]
    defaults, supported = DEFAULTS | own.DEFAULTS, SUPPORTED | own.SUPPORTED
    c = configs.fields(config, name, defaults, supported, own.HARMLESS)
    levels = len(c.block_out_channels)
    for field in ("down_block_types", "up_block_types"):
        if len(getattr(c, field)) != levels:
            raise ValueError(
                f"{field}={getattr(c, field)}: expected {levels} entries, as many as "
                f"block_out_channels={c.block_out_channels}"
            )
    return UNet(
        blocks=c.layers_per_block,
        asymmetric_downsampling=c.downsample_padding == 0,
        scale_shift=c.resnet_time_scale_shift == "scale_shift",
        num_classes=c.num_class_embeds,
        null_class=False,
        **configs.ours(FIELDS | OWN_FIELDS, c),
        **own.fields(c),
    )


def to_config(net: UNet) -> dict[str, Any]:
    """The ``config.json`` from which diffusers builds the same network.

    Raises:
      ValueError: for a network that diffusers does not have, or that does not know what it is made
        for (``in_channels``, ...).
    """
    known(net, "in_channels", "out_channels")
    if net.time_scale != 1:
        raise ValueError(f"time_scale={net.time_scale}: diffusers has only 1")
    own = unet_conditional if net.attends_to_context else unet_plain
    return {
        **own.config(net),
        **configs.theirs(FIELDS | OWN_FIELDS, net),
        "downsample_padding": 0 if net.asymmetric_downsampling else 1,
        "act_fn": "silu",
        "num_class_embeds": net.num_classes and net.num_classes + net.null_class,
        "resnet_time_scale_shift": "scale_shift" if net.scale_shift else "default",
    }


def names(net: Encoder) -> Names:
    """The name table; older files' names of self-attention are read, too."""
    return Names(dotted("linear_1", "linear_2"), aliases=FORMER_ATTENTION)


def example(net: Encoder) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Conditioning]:
    """The arguments of ``net.init``, by shape."""
    array = configs.array
    known(net, "in_channels")
    cond = {}
    if net.attends_to_context:
        known(net, "context_width")
        cond["context"] = array(1, net.context_width)
    if net.added_embedding:
        # Only the pipeline knows how this width divides into pooled text and time ids.
        known(net, "added_width")
        cond["pooled"] = array(net.added_width)
    if net.num_classes is not None:
        cond["label"] = array(dtype=jnp.int32)
    if net.guidance_width is not None:
        cond["guidance"] = array()
    size = 2 ** (len(net.widths) - 1)
    return array(size, size, net.in_channels), array(), Conditioning(**cond)


def known(net: Encoder, *fields: str) -> None:
    """Raises ValueError for one of these fields that is None."""
    for field in fields:
        if getattr(net, field) is None:
            raise ValueError(f"{field}=None: set it, as in network.clone({field}=4)")
