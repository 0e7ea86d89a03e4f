"""The fields that ``UNet2DModel`` reads in its own way; it has self-attention only."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diffusion.models.unet import UNet
from diffusion.models.unet_fields import AttentionKind
from diffusion.pretrained import fields as configs

DEFAULTS = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownBlock2D", *("AttnDownBlock2D",) * 3),
    "mid_block_type": "UNetMidBlock2D",
    "up_block_types": (*("AttnUpBlock2D",) * 3, "UpBlock2D"),
    "block_out_channels": (224, 448, 672, 896),
    "attention_head_dim": 8,
    "attn_norm_num_groups": None,
    "add_attention": True,
    "downsample_type": "conv",
    "upsample_type": "conv",
}
SUPPORTED = {
    "mid_block_type": ("UNetMidBlock2D", None),
    "downsample_type": ("conv", "resnet"),
    "upsample_type": ("conv", "resnet"),
}
HARMLESS = ("num_train_timesteps",)  # of learned time embeddings, which are not supported
DOWN = {"conv": "DownBlock2D", "resnet": "ResnetDownsampleBlock2D", "self": "AttnDownBlock2D"}
UP = {"conv": "UpBlock2D", "resnet": "ResnetUpsampleBlock2D", "self": "AttnUpBlock2D"}


def fields(c: SimpleNamespace) -> dict[str, Any]:
    """``UNet``'s fields from those of the config."""
    if not isinstance(c.layers_per_block, int):
        raise ValueError(f"layers_per_block={c.layers_per_block}: UNet2DModel takes one number")
    for field in ("down_block_types", "up_block_types"):
        setattr(c, field, tuple(name.removeprefix("UNetRes") for name in getattr(c, field)))
    down = configs.kinds(c, "down_block_types", "UNet2DModel", DOWN)
    up = configs.kinds(c, "up_block_types", "UNet2DModel", UP)[::-1]
    # The coarsest level does not downsample, and the finest does not upsample.
    resampling = {c.downsample_type if kind == "self" else kind for kind in down[:-1]}
    resampling |= {c.upsample_type if kind == "self" else kind for kind in up[1:]}
    if len(resampling) > 1:
        raise ValueError(
            f"down_block_types={c.down_block_types}, downsample_type={c.downsample_type!r}, "
            f"up_block_types={c.up_block_types}, upsample_type={c.upsample_type!r}: UNet2DModel is "
            "supported with resampling by convolutions everywhere or by ResNet blocks everywhere"
        )
    mid_attention = c.mid_block_type is not None and c.add_attention
    # With scale_shift, diffusers has no norm there unless the number of its groups is given.
    default = None if c.resnet_time_scale_shift == "scale_shift" else c.norm_num_groups
    if mid_attention and (c.attn_norm_num_groups or default) != c.norm_num_groups:
        raise ValueError(
            f"attn_norm_num_groups={c.attn_norm_num_groups}: UNet2DModel is supported with "
            f"{c.norm_num_groups}, which is norm_num_groups"
        )
    down, up = (tuple("self" if k == "self" else 0 for k in kinds) for kinds in (down, up))
    return {
        "attention": down,
        "up_attention": None if up == down else up,
        "mid_attention": "self" if mid_attention else 0,
        "mid_blocks": 0 if c.mid_block_type is None else 2,
        "head_width": c.attention_head_dim,
        "resnet_resampling": resampling == {"resnet"},
    }


def config(net: UNet) -> dict[str, Any]:
    """The config's fields from ``UNet``'s; inverse of ``fields``."""
    for field in ("added_embedding", "guidance_width"):
        if getattr(net, field):
            raise ValueError(f"{field}={getattr(net, field)}: UNet2DModel has no such input")
    if not isinstance(net.blocks, int):
        raise ValueError(f"blocks={net.blocks}: UNet2DModel takes one number")
    if net.mid_blocks not in (0, 2):
        raise ValueError(f"mid_blocks={net.mid_blocks}: UNet2DModel has 2 or none")
    levels, conv = range(len(net.widths)), "resnet" if net.resnet_resampling else "conv"
    down = [_one_kind(net, net.level_kinds("attention", level)) for level in levels]
    up = [_one_kind(net, net.up_kinds(level)) for level in levels]
    attends = [level for level in levels if "self" in (down[level], up[level])]
    if net.mid_attention == "self":
        attends.append(levels[-1])
    heads = {net.heads(level) for level in attends}
    widths = {net.widths[level] // net.heads(level) for level in attends}
    if len(widths) > 1 and heads != {1}:
        raise ValueError(
            f"num_heads={net.num_heads}, head_width={net.head_width}: UNet2DModel has one width of "
            "heads at all levels, or one head"
        )
    return {
        "_class_name": "UNet2DModel",
        "down_block_types": [DOWN[kind or conv] for kind in down],
        "mid_block_type": "UNetMidBlock2D" if net.mid_blocks else None,
        "up_block_types": [UP[kind or conv] for kind in reversed(up)],
        "layers_per_block": net.blocks,
        "attention_head_dim": None if heads in ({1}, set()) else widths.pop(),
        "attn_norm_num_groups": net.norm_groups,
        "add_attention": net.mid_attention == "self",
        "downsample_type": conv,
        "upsample_type": conv,
    }


def _one_kind(net: UNet, kinds: tuple[AttentionKind, ...]) -> AttentionKind:
    if len(set(kinds)) > 1:
        raise ValueError(
            f"attention={net.attention}, up_attention={net.up_attention}: UNet2DModel has "
            "self-attention after all of a level's blocks or after none"
        )
    return kinds[0]
