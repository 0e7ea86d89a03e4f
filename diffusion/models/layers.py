"""Layers that several backbones share."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp

from diffusion.schedules import Array


def sinusoidal(
    positions: Array,
    features: int,
    *,
    max_period: float = 10_000.0,
    cos_first: bool = True,
    freq_shift: float = 0.0,
) -> Array:
    """Sinusoidal embedding [B, features] (float32) of positions [B], which need not be integers.

    Frequencies are max_period^(-i / (features/2 - freq_shift)). Stable Diffusion, ADM and DiT put
    the cosines first with freq_shift 0; DDPM the sines with freq_shift 1.
    """
    half = features // 2
    exponents = jnp.arange(half, dtype=jnp.float32) / (half - freq_shift)
    angles = positions.astype(jnp.float32)[:, None] * max_period ** -exponents[None, :]
    parts = [jnp.cos(angles), jnp.sin(angles)]
    return jnp.concatenate(parts if cos_first else parts[::-1], axis=-1)


class EmbeddingMLP(nn.Module):
    """Dense, SiLU, Dense: makes an embedding out of sinusoids or of a conditioning vector."""

    features: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Dense(self.features, dtype=self.dtype, name="linear_1")(x)
        return nn.Dense(self.features, dtype=self.dtype, name="linear_2")(nn.silu(x))
