"""transformers' ``Dinov2Model``, as Meta's networks are published."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.models.dinov2 import DinoV2
from diffusion.pretrained import fields
from diffusion.pretrained.names import Names, dotted

CLASS = "Dinov2Model"
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "mlp_ratio": 4,
    "layer_norm_eps": 1e-6,
    "image_size": 224,
    "patch_size": 14,
    "num_channels": 3,
    "qkv_bias": True,
    "use_swiglu_ffn": False,
    "use_mask_token": True,
}
SUPPORTED = {**fields.TRANSFORMERS_SUPPORTED, "hidden_act": ("gelu",)}
HARMLESS = (
    *fields.TRANSFORMERS,
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "layerscale_value"),
    *("out_features", "out_indices", "stage_names", "apply_layernorm", "reshape_hidden_states"),
)


def from_config(config: Mapping[str, Any]) -> DinoV2:
    """The module of a ``config.json``.

    Raises:
      ValueError: for another class, an unknown field or an unsupported value.
    """
    name = fields.architecture(config, (CLASS,))
    c = fields.fields(config, name, DEFAULTS, SUPPORTED, HARMLESS)
    for field in ("image_size", "patch_size"):
        if not isinstance(getattr(c, field), int):
            raise ValueError(f"{field}={getattr(c, field)}: {CLASS} is supported with squares")
    return DinoV2(
        width=c.hidden_size,
        depth=c.num_hidden_layers,
        heads=c.num_attention_heads,
        ratio=c.mlp_ratio,
        size=c.image_size,
        patch=c.patch_size,
        channels=c.num_channels,
        swiglu=c.use_swiglu_ffn,
        qkv_bias=c.qkv_bias,
        mask_token=c.use_mask_token,
        eps=c.layer_norm_eps,
    )


def to_config(net: DinoV2) -> dict[str, Any]:
    """The ``config.json`` from which transformers builds the same network."""
    return {
        "architectures": [CLASS],
        "model_type": "dinov2",
        "hidden_size": net.width,
        "num_hidden_layers": net.depth,
        "num_attention_heads": net.heads,
        "mlp_ratio": net.ratio,
        "layer_norm_eps": net.eps,
        "image_size": net.size,
        "patch_size": net.patch,
        "num_channels": net.channels,
        "qkv_bias": net.qkv_bias,
        "use_swiglu_ffn": net.swiglu,
        "use_mask_token": net.mask_token,
    }


def names(net: DinoV2) -> Names:
    """The name table."""
    return Names(dotted())


def example(net: DinoV2) -> tuple[jax.ShapeDtypeStruct]:
    """The arguments of ``net.init``, by shape."""
    return (jax.ShapeDtypeStruct((1, net.size, net.size, net.channels), jnp.float32),)
