"""The parts of a DiT: the adaLN-Zero block and the last layer."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.transformer_layers import (
    MLPS,
    NORMS,
    CrossAttention,
    SelfAttention,
    modulate,
    zeros,
)


class Block(nn.Module):
    """adaLN-Zero block: self-attention, optional cross-attention, MLP; identity at initialisation.

    The residual stream has the compute dtype; norms, modulation and additions are float32. The
    fields are those of ``DiT``.
    """

    heads: int
    mlp_ratio: float
    norm: str
    mlp: str
    qk_norm: bool
    dropout: float
    dtype: jnp.dtype
    attention_implementation: str | None
    mlp_norm_eps: float
    train: bool

    @nn.compact
    def __call__(
        self,
        x: Array,
        c: Array,
        rotary: tuple[Array, Array] | None,
        context: Array | None,
        context_mask: Array | None,
    ) -> Array:
        width, norm = x.shape[-1], NORMS[self.norm]
        attention = (self.heads, self.qk_norm, self.dtype, self.attention_implementation)
        dropout = nn.Dropout(self.dropout, deterministic=not self.train)

        def residual(x: Array, update: Array, gate: Array | float) -> Array:
            return (x + gate * dropout(update).astype(jnp.float32)).astype(self.dtype)

        m = nn.Dense(6 * width, kernel_init=zeros, name="adaLN_modulation")(c)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = jnp.split(m, 6, axis=-1)

        h = modulate(norm(x), shift_a, scale_a).astype(self.dtype)
        x = residual(x, SelfAttention(*attention, name="attn")(h, rotary), gate_a[:, None])
        if context is not None:
            h = CrossAttention(*attention, name="cross_attn")(x, context, context_mask)
            x = residual(x, h, 1.0)
        h = modulate(norm(x, self.mlp_norm_eps), shift_m, scale_m).astype(self.dtype)
        mlp = MLPS[self.mlp](int(self.mlp_ratio * width), self.dtype, name="mlp")
        return residual(x, mlp(h), gate_m[:, None])


class FinalLayer(nn.Module):
    """Modulated norm and a linear map to ``features`` per token; zero at initialisation."""

    features: int
    norm: str

    @nn.compact
    def __call__(self, x: Array, c: Array) -> Array:
        m = nn.Dense(2 * x.shape[-1], kernel_init=zeros, name="adaLN_modulation")(c)
        shift, scale = jnp.split(m, 2, axis=-1)
        x = modulate(NORMS[self.norm](x), shift, scale)
        return nn.Dense(self.features, kernel_init=zeros, name="linear")(x)
