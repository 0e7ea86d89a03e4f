"""transformers' ``BertModel``, without its pooler."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.models.bert import Bert
from diffusion.pretrained import fields
from diffusion.pretrained.names import Names, dotted

CLASS = "BertModel"
FIELDS = {
    "vocab_size": ("vocab_size", 30_522),
    "width": ("hidden_size", 768),
    "depth": ("num_hidden_layers", 12),
    "heads": ("num_attention_heads", 12),
    "hidden": ("intermediate_size", 3072),
    "length": ("max_position_embeddings", 512),
    "segments": ("type_vocab_size", 2),
    "eps": ("layer_norm_eps", 1e-12),
}
SUPPORTED = {
    **fields.TRANSFORMERS_SUPPORTED,
    "hidden_act": ("gelu",),
    "position_embedding_type": ("absolute",),
}
HARMLESS = (
    *fields.TRANSFORMERS,
    *("hidden_dropout_prob", "attention_probs_dropout_prob", "eos_token_id"),
)


def from_config(config: Mapping[str, Any]) -> Bert:
    """The module of a ``config.json``."""
    name = fields.architecture(config, (CLASS,))
    c = fields.fields(config, name, fields.defaults(FIELDS), SUPPORTED, HARMLESS)
    return Bert(**fields.ours(FIELDS, c))


def to_config(net: Bert) -> dict[str, Any]:
    """The ``config.json`` from which transformers builds the same network."""
    return {"architectures": [CLASS], "model_type": "bert", **fields.theirs(FIELDS, net)}


def names(net: Bert) -> Names:
    """The name table; files may hold a pooler, which is not used."""
    return Names(dotted(), ignored=r"pooler\..*|embeddings\.position_ids")


def example(net: Bert) -> tuple[jax.ShapeDtypeStruct]:
    """The arguments of ``net.init``, by shape."""
    return (fields.array(8, dtype=jnp.int32),)
