"""transformers' ``Dinov2Model``, as Meta's networks are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from diffusion.models.dinov2 import DinoV2
from diffusion.pretrained import fields
from diffusion.pretrained.names import Names, dotted

CLASS = "Dinov2Model"
FIELDS = {
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "ratio": ("mlp_ratio", 4),
    "size": ("image_size", 224),
    "patch": ("patch_size", 14),
    "channels": ("num_channels", 3),
    "swiglu": ("use_swiglu_ffn", False),
    "qkv_bias": ("qkv_bias", True),
    "mask_token": ("use_mask_token", True),
    "eps": ("layer_norm_eps", 1e-6),
}
SUPPORTED = {**fields.TRANSFORMERS_SUPPORTED, "hidden_act": ("gelu",)}
HARMLESS = (
    *fields.TRANSFORMERS,
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "layerscale_value"),
    *("out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states"),
)


def from_config(config: Mapping[str, Any]) -> DinoV2:
    """The module of a ``config.json``."""
    name = fields.architecture(config, (CLASS,))
    c = fields.fields(config, name, fields.defaults(FIELDS), SUPPORTED, HARMLESS)
    size, patch = (fields.side(c, field, CLASS) for field in ("image_size", "patch_size"))
    return DinoV2(**fields.ours(FIELDS, c) | {"size": size, "patch": patch})


def to_config(net: DinoV2) -> dict[str, Any]:
    """The ``config.json`` from which transformers builds the same network."""
    return {"architectures": [CLASS], "model_type": "dinov2", **fields.theirs(FIELDS, net)}


def names(net: DinoV2) -> Names:
    """The name table."""
    return Names(dotted())


def example(net: DinoV2) -> tuple[jax.ShapeDtypeStruct]:
    """The arguments of ``net.init``, by shape."""
    return (fields.array(net.size, net.size, net.channels),)
