"""Attention over tokens, and the transformer that latent diffusion puts into its U-Net."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from diffusion.schedules import Array


def attend(
    q: Array,
    k: Array,
    v: Array,
    mask: Array | None = None,
    implementation: str | None = None,
) -> Array:
    """softmax(q k^T / sqrt(D)) v with the softmax in float32.

    Args:
      q: queries [B, L, H, D].
      k, v: keys and values [B, Lk, H, D].
      mask: [B, Lk] bool, True where a key is attended to; at least one per example.
      implementation: as in ``jax.nn.dot_product_attention``: 'xla', 'cudnn' (fp16 or bf16 only,
        D a multiple of 8), or None, which lets JAX choose.

    Returns:
      [B, L, H, D] in q's dtype.
    """
    if mask is not None:
        if mask.shape != k.shape[:2]:
            raise ValueError(
                f"mask has shape {mask.shape}; expected one bool per key, {k.shape[:2]}"
            )
        mask = mask.astype(jnp.bool_)[:, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation=implementation)
