"""transformers' ``CLIPTextModel``, ``CLIPTextModelWithProjection``,
``CLIPVisionModelWithProjection`` and ``CLIPModel``, which is the last two together.

Keys are read with and without the prefix ``text_model.`` (``vision_model.``), and written with it,
as in the published files; transformers 4 and other libraries read no other keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.models.clip import ACTIVATIONS, ClipPair, ClipText, ClipVision
from diffusion.pretrained import fields
from diffusion.pretrained.names import Names, dotted

TEXT, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
VISION, PAIR = "CLIPVisionModelWithProjection", "CLIPModel"
COMMON = {
    "width": ("hidden_size", 512),
    "depth": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 8),
    "hidden": ("intermediate_size", 2048),
    "activation": ("hidden_act", "quick_gelu"),
    "eps": ("layer_norm_eps", 1e-5),
}
TEXT_FIELDS = {
    **COMMON,
    "vocab_size": ("vocab_size", 49_408),
    "length": ("max_position_embeddings", 77),
}
VISION_FIELDS = {
    **COMMON,
    "width": ("hidden_size", 768),
    "heads": ("num_attention_heads", 12),
    "hidden": ("intermediate_size", 3072),
    "channels": ("num_channels", 3),
    "projection": ("projection_dim", 512),
}
SUPPORTED = {**fields.TRANSFORMERS_SUPPORTED, "hidden_act": tuple(ACTIVATIONS)}
PAIR_HARMLESS = (
    *fields.TRANSFORMERS,
    *("text_config_dict", "vision_config_dict"),  # older files' copies of the two configs
    "logit_scale_init_value",
)
LARGEST = 2  # with this end token, transformers looks for each text's largest token


def from_config(config: Mapping[str, Any]) -> ClipText | ClipVision | ClipPair:
    """The module of a ``config.json``."""
    name = fields.architecture(config, (TEXT, PROJECTED, VISION, PAIR))
    if name == PAIR:
        return _pair(config)
    if name == VISION:
        defaults = fields.defaults(VISION_FIELDS) | {"image_size": 224, "patch_size": 32}
        harmless = (*fields.TRANSFORMERS, "eos_token_id")
        c = fields.fields(config, VISION, defaults, SUPPORTED, harmless)
        size, patch = (fields.side(c, field, VISION) for field in ("image_size", "patch_size"))
        return ClipVision(size=size, patch=patch, **fields.ours(VISION_FIELDS, c))
    defaults = fields.defaults(TEXT_FIELDS) | {"projection_dim": 512, "eos_token_id": 49_407}
    c = fields.fields(config, name, defaults, SUPPORTED, fields.TRANSFORMERS)
    if not isinstance(c.eos_token_id, int):
        raise ValueError(f"eos_token_id={c.eos_token_id!r}: {name} is supported with a number")
    return ClipText(
        end=None if c.eos_token_id == LARGEST else c.eos_token_id,
        projection=c.projection_dim if name == PROJECTED else None,
        **fields.ours(TEXT_FIELDS, c),
    )


def _pair(config: Mapping[str, Any]) -> ClipPair:
    """The pair's own projection is that of both its encoders."""
    defaults = {"projection_dim": 512, "text_config": {}, "vision_config": {}}
    c = fields.fields(config, PAIR, defaults, fields.TRANSFORMERS_SUPPORTED, PAIR_HARMLESS)
    towers = {}
    for name, architecture in (("text_config", PROJECTED), ("vision_config", VISION)):
        own = {"architectures": [architecture], "projection_dim": c.projection_dim}
        towers[name.removesuffix("_config")] = from_config({**config.get(name, {}), **own})
    return ClipPair(**towers)


def to_config(net: ClipText | ClipVision | ClipPair) -> dict[str, Any]:
    """The ``config.json`` from which transformers builds the same network."""
    if isinstance(net, ClipPair):
        return {
            "architectures": [PAIR],
            "model_type": "clip",
            "projection_dim": net.vision.projection,
            "text_config": to_config(net.text),
            "vision_config": to_config(net.vision),
        }
    if isinstance(net, ClipVision):
        return {
            "architectures": [VISION],
            "model_type": "clip_vision_model",
            "image_size": net.size,
            "patch_size": net.patch,
            **fields.theirs(VISION_FIELDS, net),
        }
    return {
        "architectures": [TEXT if net.projection is None else PROJECTED],
        "model_type": "clip_text_model",
        "eos_token_id": LARGEST if net.end is None else net.end,
        "projection_dim": net.width if net.projection is None else net.projection,
        **fields.theirs(TEXT_FIELDS, net),
    }


def names(net: ClipText | ClipVision | ClipPair) -> Names:
    """The name table."""
    if isinstance(net, ClipPair):
        towers = {"text": names(net.text).rename, "vision": names(net.vision).rename}

        def rename(path: str) -> str:
            tower, _, rest = path.partition("/")
            return towers[tower](rest) if tower else ""

        return Names(rename, ignored=r"(text|vision)_model\.embeddings\.position_ids")
    model, head, rule = "text_model", "text_projection", dotted()
    if isinstance(net, ClipVision):
        model, head = "vision_model", "visual_projection"
    return Names(
        lambda path: head if path == head else f"{model}.{rule(path)}",
        aliases=((rf"^(?!{model}\.|{head}\.)", f"{model}."),),
        ignored=rf"{model}\.embeddings\.position_ids",
    )


def example(net: ClipText | ClipVision | ClipPair) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The arguments of ``net.init``, by shape."""
    if isinstance(net, ClipPair):
        return (*example(net.text), *example(net.vision))
    if isinstance(net, ClipVision):
        return (fields.array(net.size, net.size, net.channels),)
    return (fields.array(net.length, dtype=jnp.int32),)
