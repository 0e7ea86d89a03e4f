"""transformers' ``CLIPTextModel``, ``CLIPTextModelWithProjection`` and
``CLIPVisionModelWithProjection``.

Keys are read with and without ``text_model.`` (``vision_model.``) in front, and written with it: so
are the published files, and transformers 4 and others read nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.models.clip import ACTIVATIONS, ClipText, ClipVision
from diffusion.pretrained import fields
from diffusion.pretrained.names import Names, dotted

TEXT, PROJECTED, VISION = (
    "CLIPTextModel",
    "CLIPTextModelWithProjection",
    "CLIPVisionModelWithProjection",
)
COMMON = {
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
}
TEXT_DEFAULTS = {
    **COMMON,
    "vocab_size": 49_408,
    "hidden_size": 512,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "eos_token_id": 49_407,
}
VISION_DEFAULTS = {
    **COMMON,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
}
SUPPORTED = {**fields.TRANSFORMERS_SUPPORTED, "hidden_act": tuple(ACTIVATIONS)}
LARGEST = 2  # the end token by which transformers takes each text's largest


def from_config(config: Mapping[str, Any]) -> ClipText | ClipVision:
    """The module of a ``config.json``.

    Raises:
      ValueError: for another class, an unknown field or an unsupported value.
    """
    name = fields.architecture(config, (TEXT, PROJECTED, VISION))
    if name == VISION:
        return _vision(config)
    c = fields.fields(config, name, TEXT_DEFAULTS, SUPPORTED, fields.TRANSFORMERS)
    if not isinstance(c.eos_token_id, int):
        raise ValueError(f"eos_token_id={c.eos_token_id!r}: {name} is supported with a number")
    return ClipText(
        vocab_size=c.vocab_size,
        width=c.hidden_size,
        depth=c.num_hidden_layers,
        heads=c.num_attention_heads,
        hidden=c.intermediate_size,
        length=c.max_position_embeddings,
        activation=c.hidden_act,
        end=None if c.eos_token_id == LARGEST else c.eos_token_id,
        projection=c.projection_dim if name == PROJECTED else None,
        eps=c.layer_norm_eps,
    )


def _vision(config: Mapping[str, Any]) -> ClipVision:
    harmless = (*fields.TRANSFORMERS, "eos_token_id")
    c = fields.fields(config, VISION, VISION_DEFAULTS, SUPPORTED, harmless)
    sides = {}
    for field in ("image_size", "patch_size"):
        given = getattr(c, field)
        both = set(given) if isinstance(given, tuple) else {given}
        if len(both) != 1:
            raise ValueError(f"{field}={given}: {VISION} is supported with squares")
        sides[field] = both.pop()
    return ClipVision(
        width=c.hidden_size,
        depth=c.num_hidden_layers,
        heads=c.num_attention_heads,
        hidden=c.intermediate_size,
        size=sides["image_size"],
        patch=sides["patch_size"],
        channels=c.num_channels,
        activation=c.hidden_act,
        projection=c.projection_dim,
        eps=c.layer_norm_eps,
    )


def to_config(net: ClipText | ClipVision) -> dict[str, Any]:
    """The ``config.json`` from which transformers builds the same network."""
    config = {
        "hidden_size": net.width,
        "num_hidden_layers": net.depth,
        "num_attention_heads": net.heads,
        "intermediate_size": net.hidden,
        "hidden_act": net.activation,
        "layer_norm_eps": net.eps,
    }
    if isinstance(net, ClipVision):
        return config | {
            "architectures": [VISION],
            "model_type": "clip_vision_model",
            "image_size": net.size,
            "patch_size": net.patch,
            "num_channels": net.channels,
            "projection_dim": net.projection,
        }
    return config | {
        "architectures": [TEXT if net.projection is None else PROJECTED],
        "model_type": "clip_text_model",
        "vocab_size": net.vocab_size,
        "max_position_embeddings": net.length,
        "eos_token_id": LARGEST if net.end is None else net.end,
        "projection_dim": net.width if net.projection is None else net.projection,
    }


def names(net: ClipText | ClipVision) -> Names:
    """The name table."""
    images = isinstance(net, ClipVision)
    model, head = (
        ("vision_model", "visual_projection") if images else ("text_model", "text_projection")
    )
    rule = dotted()
    return Names(
        lambda path: head if path == head else f"{model}.{rule(path)}",
        aliases=((rf"^(?!{model}\.|{head}\.)", f"{model}."),),
        ignored=rf"{model}\.embeddings\.position_ids",
    )


def example(net: ClipText | ClipVision) -> tuple[jax.ShapeDtypeStruct]:
    """The arguments of ``net.init``, by shape."""
    if isinstance(net, ClipVision):
        return (jax.ShapeDtypeStruct((1, net.size, net.size, net.channels), jnp.float32),)
    return (jax.ShapeDtypeStruct((1, net.length), jnp.int32),)
