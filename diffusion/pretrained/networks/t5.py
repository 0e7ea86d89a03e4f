"""transformers' ``T5EncoderModel``: encoders of T5 and T5 v1.1, also from whole T5 models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.models.t5 import T5Encoder
from diffusion.pretrained import fields
from diffusion.pretrained.names import Names, dotted

CLASSES = ("T5EncoderModel", "T5ForConditionalGeneration", "T5Model", "T5WithLMHeadModel")
FIELDS = {
    "vocab_size": ("vocab_size", 32_128),
    "width": ("d_model", 512),
    "depth": ("num_layers", 6),
    "heads": ("num_heads", 8),
    "head_width": ("d_kv", 64),
    "hidden": ("d_ff", 2048),
    "buckets": ("relative_attention_num_buckets", 32),
    "furthest": ("relative_attention_max_distance", 128),
    "eps": ("layer_norm_epsilon", 1e-6),
}
ACTIVATIONS = {"relu": ("relu", False), "gated-gelu": ("gelu_new", True)}
SUPPORTED = {**fields.TRANSFORMERS_SUPPORTED, "feed_forward_proj": tuple(ACTIVATIONS)}
HARMLESS = (
    *fields.TRANSFORMERS,
    *("dense_act_fn", "is_gated_act"),  # follow from feed_forward_proj, which is checked
    *("dropout_rate", "eos_token_id", "n_positions", "num_decoder_layers", "scale_decoder_outputs"),
)


def from_config(config: Mapping[str, Any]) -> T5Encoder:
    """The module of a ``config.json``."""
    name = fields.architecture(config, CLASSES)
    defaults = fields.defaults(FIELDS) | {"feed_forward_proj": "relu"}
    c = fields.fields(config, name, defaults, SUPPORTED, HARMLESS)
    function, gated = ACTIVATIONS[c.feed_forward_proj]
    for field, value in (("dense_act_fn", function), ("is_gated_act", gated)):
        if config.get(field, value) != value:
            raise ValueError(
                f"{field}={config[field]!r}: with feed_forward_proj={c.feed_forward_proj!r}, "
                f"{name} is supported with {value!r}"
            )
    return T5Encoder(gated=gated, **fields.ours(FIELDS, c))


def to_config(net: T5Encoder) -> dict[str, Any]:
    """The ``config.json`` from which transformers builds the same network."""
    return {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "feed_forward_proj": "gated-gelu" if net.gated else "relu",
        **fields.theirs(FIELDS, net),
    }


def names(net: T5Encoder) -> Names:
    """The name table; a file may hold the embeddings twice, and a decoder."""
    return Names(
        dotted("wi_0", "wi_1"),
        aliases=(("^encoder\\.embed_tokens\\.", "shared."),),
        ignored=r"decoder\..*|lm_head\..*",
    )


def example(net: T5Encoder) -> tuple[jax.ShapeDtypeStruct]:
    """The arguments of ``net.init``, by shape."""
    return (fields.array(8, dtype=jnp.int32),)
