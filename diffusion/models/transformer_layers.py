"""Layers of diffusion transformers: patches, norms without parameters, attention, MLPs."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.attention import Attend
from diffusion.models.positions import rotate

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros


def layer_norm(x: Array, eps: float = 1e-6) -> Array:
    """Zero mean, unit variance over the last axis; no parameters; float32."""
    x = x.astype(jnp.float32)
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


def rms_norm(x: Array, eps: float = 1e-6) -> Array:
    """Unit mean square over the last axis; no parameters; float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + eps)


NORMS = {"layer": layer_norm, "rms": rms_norm}


def patchify(x: Array, patch: int) -> Array:
    """[B, H, W, C] -> tokens [B, H/patch * W/patch, patch * patch * C], in row-major order."""
    b, h, w, c = x.shape
    x = x.reshape(b, h // patch, patch, w // patch, patch, c).swapaxes(2, 3)
    return x.reshape(b, -1, patch * patch * c)


def unpatchify(tokens: Array, patch: int, height: int, width: int) -> Array:
    """Inverse of ``patchify`` for an image of height x width pixels."""
    b = tokens.shape[0]
    x = tokens.reshape(b, height // patch, width // patch, patch, patch, -1).swapaxes(2, 3)
    return x.reshape(b, height, width, -1)


def modulate(x: Array, shift: Array, scale: Array) -> Array:
    """x [B, L, D] scaled by 1 + scale [B, D] and shifted by shift [B, D]."""
    return x * (1 + scale[:, None]) + shift[:, None]


class SelfAttention(nn.Module):
    """Multi-head self-attention over tokens [B, L, D].

    With qk_norm queries and keys are RMS-normalised per head, before any rotation.
    """

    heads: int
    qk_norm: bool
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, x: Array, rotary: tuple[Array, Array] | None) -> Array:
        b, length, width = x.shape
        qkv = nn.Dense(3 * width, kernel_init=xavier, dtype=self.dtype, name="qkv")(x)
        q, k, v = (a.reshape(b, length, self.heads, -1) for a in jnp.split(qkv, 3, axis=-1))
        if self.qk_norm:
            q = nn.RMSNorm(dtype=self.dtype, name="q_norm")(q)
            k = nn.RMSNorm(dtype=self.dtype, name="k_norm")(k)
        if rotary is not None:
            q, k = rotate(q, *rotary), rotate(k, *rotary)
        x = Attend(True, self.implementation, name="attend")(q, k, v).reshape(b, length, width)
        return nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="proj")(x)


class CrossAttention(nn.Module):
    """Attention from tokens [B, L, D] to context [B, M, C] under a mask [B, M].

    The output projection is zero at initialisation, as in PixArt-alpha (Chen et al., 2023).
    """

    heads: int
    qk_norm: bool
    dtype: jnp.dtype
    implementation: str | None

    @nn.compact
    def __call__(self, x: Array, context: Array, mask: Array | None) -> Array:
        b, length, width = x.shape
        q = nn.Dense(width, kernel_init=xavier, dtype=self.dtype, name="q")(x)
        kv = nn.Dense(2 * width, kernel_init=xavier, dtype=self.dtype, name="kv")(context)
        q = q.reshape(b, length, self.heads, -1)
        k, v = (a.reshape(b, -1, *q.shape[2:]) for a in jnp.split(kv, 2, axis=-1))
        if self.qk_norm:
            q = nn.RMSNorm(dtype=self.dtype, name="q_norm")(q)
            k = nn.RMSNorm(dtype=self.dtype, name="k_norm")(k)
        x = Attend(False, self.implementation, name="attend")(q, k, v, mask)
        x = x.reshape(b, length, width)
        return nn.Dense(width, kernel_init=zeros, dtype=self.dtype, name="proj")(x)


class GeluMLP(nn.Module):
    """Dense to hidden, tanh-approximated GELU, Dense back."""

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        h = nn.Dense(self.hidden, kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        h = nn.gelu(h, approximate=True)
        return nn.Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="fc2")(h)


class SwiGLU(nn.Module):
    """Gated MLP silu(a) * b (Shazeer, 2020); fc1 gives a and b side by side.

    ``hidden`` is the hidden width of the plain MLP that it replaces. Two thirds of it, rounded to a
    multiple of 64, keep the number of parameters.
    """

    hidden: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Array) -> Array:
        hidden = 64 * max(1, round(self.hidden * 2 / 3 / 64))
        h = nn.Dense(2 * hidden, kernel_init=xavier, dtype=self.dtype, name="fc1")(x)
        a, b = jnp.split(h, 2, axis=-1)
        return nn.Dense(x.shape[-1], kernel_init=xavier, dtype=self.dtype, name="fc2")(
            nn.silu(a) * b
        )


MLPS = {"gelu": GeluMLP, "swiglu": SwiGLU}
