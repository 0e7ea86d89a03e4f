"""The fields that ``UNet2DConditionModel`` and ``ControlNetModel`` read in their own way:
transformers and conditioning.

``attention_head_dim`` is the number of heads there, and ``transformer_layers_per_block`` holds, by
level, one depth or a list with one for each ResNet block.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from diffusion.models.unet import UNet
from diffusion.models.unet_encoder import Encoder
from diffusion.models.unet_fields import AttentionKind
from diffusion.pretrained import fields as configs

ENCODER_FIELDS = {
    "only_cross_attention": ("only_cross_attention", False),
    "linear_projection": ("use_linear_projection", False),
    "upcast_attention": ("upcast_attention", False),
}
FIELDS = {**ENCODER_FIELDS, "guidance_width": ("time_cond_proj_dim", None)}
ENCODER_DEFAULTS = {
    **configs.defaults(ENCODER_FIELDS),
    "attention_head_dim": 8,
    "in_channels": 4,
    "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "block_out_channels": (320, 640, 1280, 1280),
    "cross_attention_dim": 1280,
    "transformer_layers_per_block": 1,
    "addition_embed_type": None,
    "addition_time_embed_dim": None,
    "projection_class_embeddings_input_dim": None,
}
DEFAULTS = {
    **ENCODER_DEFAULTS,
    **configs.defaults(FIELDS),
    "out_channels": 4,
    "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    "reverse_transformer_layers_per_block": None,
}
ENCODER_SUPPORTED = {
    "mid_block_type": ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None),
    "addition_embed_type": (None, "text_time"),
    # diffusers refuses it, too: attention_head_dim holds the number of heads.
    "num_attention_heads": (None,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
}
SUPPORTED = {
    **ENCODER_SUPPORTED,
    "dual_cross_attention": (False,),
    "resnet_skip_time_act": (False,),
    "resnet_out_scale_factor": (1,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "attention_type": ("default",),
    "class_embeddings_concat": (False,),
    "cross_attention_norm": (None,),
}
# Fields of blocks and embeddings that are not supported.
HARMLESS = ("mid_block_only_cross_attention", "addition_embed_type_num_heads")
DOWN = {False: "DownBlock2D", True: "CrossAttnDownBlock2D"}
UP = {False: "UpBlock2D", True: "CrossAttnUpBlock2D"}
MID = {0: None, 1: "UNetMidBlock2D", 2: "UNetMidBlock2DCrossAttn"}


def fields(c: SimpleNamespace) -> dict[str, Any]:
    """``UNet``'s fields from those of the config."""
    levels = len(c.block_out_channels)
    encoder, depths = encoder_fields(c), _per_level(c, "transformer_layers_per_block", levels)
    up_attends = configs.kinds(c, "up_block_types", "UNet2DConditionModel", UP)[::-1]
    if c.reverse_transformer_layers_per_block is not None:
        up_depths = _per_level(c, "reverse_transformer_layers_per_block", levels)[::-1]
    elif any(isinstance(depth, tuple) for depth in depths):
        raise ValueError(
            f"transformer_layers_per_block={depths}: with depths of single blocks, "
            "reverse_transformer_layers_per_block must give those of the up blocks"
        )
    else:
        up_depths = depths
    down = encoder["attention"]
    up = tuple(_kind(up_depths[i]) if up_attends[i] else 0 for i in range(levels))
    if not (any(down) or any(up) or c.mid_block_type == MID[2]):
        raise ValueError(
            f"down_block_types={c.down_block_types}: UNet2DConditionModel is supported with at "
            f"least one {DOWN[True]}; without, it is a UNet2DModel"
        )
    return {
        **encoder,
        "up_attention": None if up == down else up,
        "guidance_width": c.time_cond_proj_dim,
    }


def encoder_fields(c: SimpleNamespace) -> dict[str, Any]:
    """``Encoder``'s fields from those of the config."""
    levels = len(c.block_out_channels)
    depths = _per_level(c, "transformer_layers_per_block", levels)
    attends = configs.kinds(c, "down_block_types", "UNet2DConditionModel", DOWN)
    contexts = set(_per_level(c, "cross_attention_dim", levels))
    if len(contexts) > 1:
        raise ValueError(
            f"cross_attention_dim={c.cross_attention_dim}: UNet2DConditionModel is supported with "
            "one width of the context for all levels"
        )
    added = {}
    if c.addition_embed_type == "text_time":
        for field in ("addition_time_embed_dim", "projection_class_embeddings_input_dim"):
            if getattr(c, field) is None:
                raise ValueError(f"{field}=None: addition_embed_type='text_time' needs it")
        added = {
            "added_embedding": True,
            "time_id_width": c.addition_time_embed_dim,
            "added_width": c.projection_class_embeddings_input_dim,
        }
    mid_depth = depths[-1][0] if isinstance(depths[-1], tuple) else depths[-1]
    return {
        "attention": tuple(_kind(depths[i]) if attends[i] else 0 for i in range(levels)),
        "mid_attention": _kind(mid_depth) if c.mid_block_type == MID[2] else 0,
        "mid_blocks": next(count for count, name in MID.items() if name == c.mid_block_type),
        "num_heads": c.attention_head_dim,
        "context_width": contexts.pop(),
        **configs.ours(ENCODER_FIELDS, c),
        **added,
    }


def config(net: UNet) -> dict[str, Any]:
    """The config's fields from ``UNet``'s; inverse of ``fields``."""
    levels, encoder = range(len(net.widths)), encoder_config(net)
    up = [_depth(net, net.up_kinds(level)) for level in levels]
    depths = encoder["transformer_layers_per_block"]
    up_depths = [depths[i] if depth is None else depth for i, depth in enumerate(up)]
    reversed_depths = None
    if up_depths != depths or any(isinstance(depth, list) for depth in depths):
        reversed_depths = up_depths[::-1]
    return {
        "_class_name": "UNet2DConditionModel",
        **encoder,
        "up_block_types": [UP[depth is not None] for depth in reversed(up)],
        "reverse_transformer_layers_per_block": reversed_depths,
        "time_cond_proj_dim": net.guidance_width,
    }


def encoder_config(net: Encoder) -> dict[str, Any]:
    """The config's fields from ``Encoder``'s; inverse of ``encoder_fields``."""
    if net.context_width is None:
        raise ValueError("context_width=None: set it, as in network.clone(context_width=768)")
    levels = range(len(net.widths))
    heads = net.num_heads if isinstance(net.num_heads, int) else [*map(net.heads, levels)]
    down = [_depth(net, net.level_kinds("attention", level)) for level in levels]
    if net.mid_blocks not in MID or (net.mid_blocks == 2 and net.mid_attention in (0, "self")):
        raise ValueError(
            f"mid_blocks={net.mid_blocks}, mid_attention={net.mid_attention!r}: "
            "UNet2DConditionModel has one ResNet block, two with transformers in between, or none"
        )
    if net.resnet_resampling:
        raise ValueError("resnet_resampling=True: UNet2DConditionModel is supported with False")
    # Levels without transformers have a depth, too; the coarsest level's is that of the middle.
    depths = [1 if depth is None else depth for depth in down]
    if net.mid_blocks == 2:
        last = depths[-1][0] if isinstance(depths[-1], list) else depths[-1]
        mid = _depth(net, (net.mid_attention,))
        if down[-1] is not None and last != mid:
            raise ValueError(
                f"mid_attention={net.mid_attention}: UNet2DConditionModel has there what follows "
                f"the coarsest level's first block, {last}"
            )
        depths[-1] = mid if down[-1] is None else depths[-1]
    return {
        "down_block_types": [DOWN[depth is not None] for depth in down],
        "mid_block_type": MID[net.mid_blocks],
        "layers_per_block": list(net.blocks) if isinstance(net.blocks, tuple) else net.blocks,
        "transformer_layers_per_block": depths,
        **configs.theirs(ENCODER_FIELDS, net),
        "cross_attention_dim": net.context_width,
        "attention_head_dim": heads,
        "addition_embed_type": "text_time" if net.added_embedding else None,
        "addition_time_embed_dim": net.time_id_width if net.added_embedding else None,
        "projection_class_embeddings_input_dim": net.added_width,
    }


def _per_level(c: SimpleNamespace, field: str, levels: int) -> tuple:
    value = getattr(c, field)
    value = value if isinstance(value, tuple) else (value,) * levels
    if len(value) != levels:
        raise ValueError(
            f"{field}={value}: expected {levels} entries, as many as "
            f"block_out_channels={c.block_out_channels}"
        )
    return value


def _kind(depth: int | tuple[int, ...]) -> AttentionKind | tuple[AttentionKind, ...]:
    if isinstance(depth, tuple):
        kinds = tuple(map(_kind, depth))
        return kinds[0] if len(set(kinds)) == 1 else kinds
    return depth or "projections"


def _depth(net: Encoder, kinds: tuple[AttentionKind, ...]) -> int | list[int] | None:
    """The number of transformer blocks, one for all kinds or a list; None without transformers."""
    if "self" in kinds or (0 in kinds and len(set(kinds)) > 1):
        raise ValueError(
            f"attention={net.attention}, up_attention={net.up_attention}: UNet2DConditionModel has "
            "transformers after all of a level's blocks or after none, and no other self-attention"
        )
    if 0 in kinds:
        return None
    depths = [0 if kind == "projections" else kind for kind in kinds]
    return depths[0] if len(set(depths)) == 1 else depths
