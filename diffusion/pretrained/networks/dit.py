"""diffusers' ``DiTTransformer2DModel``: DiT (Peebles & Xie, 2022), such as DiT-XL/2.

Every block there has its own embedders of time and class, which are equal in the published files.
Here there is one of each, and reading checks that all are equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.models.dit import DiT
from diffusion.pretrained import fields
from diffusion.pretrained.names import KERNEL, PLAIN, Layout, Names, Row, copies, fused, substituted

FIELDS = {
    "heads": ("num_attention_heads", 16),
    "depth": ("num_layers", 28),
    "patch": ("patch_size", 2),
    "num_classes": ("num_embeds_ada_norm", 1000),
    "dropout": ("dropout", 0.0),
    "mlp_norm_eps": ("norm_eps", 1e-5),
    "in_channels": ("in_channels", 4),
    "image_size": ("sample_size", 32),
}
DEFAULTS = {**fields.defaults(FIELDS), "attention_head_dim": 72, "out_channels": None}
SUPPORTED = {
    "attention_bias": (True,),
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
}
# Our fields that are fixed there.
NEEDED = {
    **{"mlp_ratio": 4.0, "positions": "sincos", "norm": "layer", "mlp": "gelu", "qk_norm": False},
    **{"cross_attention": False, "pooled": False, "time_freq_shift": 1.0},
}
# There is no group norm, and the softmax is in float32 anyway.
HARMLESS = ("norm_num_groups", "upcast_attention")
# The former class of the same network; some of its fields have other defaults.
FORMER = "Transformer2DModel"
FORMER_DEFAULTS = {
    "attention_head_dim": 88,
    "num_layers": 1,
    "in_channels": None,
    "sample_size": None,
    "patch_size": None,
    "num_embeds_ada_norm": None,
    "attention_bias": False,
    "activation_fn": "geglu",
    "norm_type": "layer_norm",
    "norm_elementwise_affine": True,
}
FORMER_SUPPORTED = {
    "cross_attention_dim": (None,),
    "num_vector_embeds": (None,),
    "use_linear_projection": (False,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
    "attention_type": ("default",),
    "caption_channels": (None,),
    "interpolation_scale": (None,),
    "use_additional_conditions": (None, False),
}


def from_config(config: Mapping[str, Any]) -> DiT:
    """The module of a ``config.json``."""
    name = fields.architecture(config, ("DiTTransformer2DModel", FORMER))
    defaults, supported = DEFAULTS, SUPPORTED
    if name == FORMER:
        defaults, supported = DEFAULTS | FORMER_DEFAULTS, SUPPORTED | FORMER_SUPPORTED
    c = fields.fields(config, name, defaults, supported, HARMLESS)
    for field in ("in_channels", "sample_size", "patch_size", "num_embeds_ada_norm"):
        if not isinstance(getattr(c, field), int):
            raise ValueError(f"{field}={getattr(c, field)!r}: {name} is supported with a number")
    if c.out_channels not in (None, c.in_channels, 2 * c.in_channels):
        raise ValueError(
            f"out_channels={c.out_channels}: {name} is supported with in_channels={c.in_channels} "
            "or twice that (learned variances)"
        )
    return DiT(
        width=c.num_attention_heads * c.attention_head_dim,
        learned_variance=c.out_channels == 2 * c.in_channels,
        time_freq_shift=1.0,
        **fields.ours(FIELDS, c),
    )


def to_config(net: DiT) -> dict[str, Any]:
    """The ``config.json`` from which diffusers builds the same network.

    Raises:
      ValueError: for a network that diffusers does not have, or that does not know what it is made
        for (``in_channels``, ``image_size``).
    """
    for field, value in NEEDED.items():
        if getattr(net, field) != value:
            raise ValueError(f"{field}={getattr(net, field)!r}: DiTTransformer2DModel has {value}")
    for field in ("num_classes", "in_channels", "image_size"):
        if not getattr(net, field):
            raise ValueError(f"{field}={getattr(net, field)}: DiTTransformer2DModel needs it")
    return {
        "_class_name": "DiTTransformer2DModel",
        "attention_head_dim": net.width // net.heads,
        "out_channels": net.in_channels * (2 if net.learned_variance else 1),
        **{field: value for field, (value,) in SUPPORTED.items()},
        **fields.theirs(FIELDS, net),
    }


def names(net: DiT) -> Names:
    """The name table of an unrolled network."""
    if net.scan:
        raise ValueError(
            "scan=True: the name table is that of the unrolled network; convert its parameters "
            "with dit.stack_blocks and unstack_blocks"
        )

    def everywhere(key: str) -> tuple[str, ...]:
        return tuple(f"transformer_blocks.{i}.norm1.emb.{key}" for i in range(net.depth))

    time, classes = r"timestep_embedder.\1", "class_embedder.embedding_table.weight"
    rows = [
        Row(("x_embedder/kernel",), ("pos_embed.proj.weight",), _patches(net.patch)),
        Row((r"t_embedder/(\w+)/kernel",), everywhere(f"{time}.weight"), copies(net.depth, KERNEL)),
        Row((r"t_embedder/(\w+)/bias",), everywhere(f"{time}.bias"), copies(net.depth, PLAIN)),
        Row(("y_embedder/embedding",), everywhere(classes), copies(net.depth, PLAIN)),
    ]
    for ours, theirs in (("kernel", "weight"), ("bias", "bias")):
        keys = tuple(rf"transformer_blocks.\1.attn1.to_{name}.{theirs}" for name in "qkv")
        rows.append(Row((rf"blocks_(\d+)/attn/qkv/{ours}",), keys, fused(3)))
    rename = substituted(
        ("^x_embedder$", "pos_embed.proj"),
        (r"^blocks_(\d+)/", r"transformer_blocks.\1/"),
        ("/adaLN_modulation$", "/norm1/linear"),
        ("/attn/proj$", "/attn1/to_out.0"),
        ("/mlp/fc1$", "/ff/net.0/proj"),
        ("/mlp/fc2$", "/ff/net.2"),
        ("^final_layer/norm1/linear$", "proj_out_1"),
        ("^final_layer/linear$", "proj_out_2"),
        ("/", "."),
    )
    return Names(rename, tuple(rows))


def example(net: DiT) -> tuple[jax.ShapeDtypeStruct, jax.ShapeDtypeStruct, Conditioning]:
    """The arguments of ``net.init``, by shape."""
    if net.in_channels is None:
        raise ValueError("in_channels=None: set it, as in network.clone(in_channels=4)")
    x = fields.array(net.patch, net.patch, net.in_channels)
    return x, fields.array(), Conditioning(label=fields.array(dtype=jnp.int32))


def _patches(patch: int) -> Layout:
    """A convolution [width, C, patch, patch] there, a matrix [patch * patch * C, width] here."""

    def join(arrays):
        kernel = np.transpose(arrays[0], (2, 3, 1, 0))  # [patch, patch, C, width]
        return [kernel.reshape(-1, kernel.shape[-1])]

    def split(arrays):
        kernel = arrays[0].reshape(patch, patch, -1, arrays[0].shape[-1])
        return [np.transpose(kernel, (3, 2, 0, 1))]

    return Layout(join, split)
