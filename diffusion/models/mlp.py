"""A residual network for points, [B, D], which is called as the U-Net is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros

from diffusion.conditioning import Conditioning
from diffusion.levels import Array
from diffusion.models.fields import check_at_least_one, check_dropout, check_even
from diffusion.models.layers import EmbeddingMLP, SpanEmbedding, guidance_sinusoids, sinusoidal


class MLP(nn.Module):
    """Residual blocks whose norm is scaled and shifted by the embedding of time and label.

    h <- h + W2 silu(W1 ((1 + scale) * norm(h) + shift)), with W2 and the output starting at zero.

    Attributes:
      width: features of the residual stream (even); the hidden layers have twice as many.
      depth: number of residual blocks.
      num_classes: size of the label embedding, without the null class; None: labels are not used.
      null_class: whether the embedding has a row ``num_classes`` that stands for "no class".
      time_scale: factor on c_noise before the sinusoids, whose periods are 2 pi to 2 pi * 10^4: 1
        for c_noise in [0, 1000], about 250 for log(sigma) / 4.
      dropout: rate within blocks, when training.
      out_features: of the output; by default as many as x has.
      guidance_width: sinusoids for ``cond.guidance`` (``layers.guidance_sinusoids``); None: not
        used.
      two_times: whether it is told where it aims, by ``cond.span``.
      dtype: of the computation; parameters and norm statistics are float32.
    """

    width: int = 128
    depth: int = 4
    num_classes: int | None = None
    null_class: bool = True
    time_scale: float = 1.0
    dropout: float = 0.0
    out_features: int | None = None
    guidance_width: int | None = None
    two_times: bool = False
    dtype: jnp.dtype = jnp.float32

    @property
    def feature_blocks(self) -> tuple[int, int]:
        """The number of the last block that ``features`` may name, and of the middle one."""
        return self.depth, (self.depth + 1) // 2

    def __post_init__(self) -> None:
        check_even(self, "width")
        check_at_least_one(self, "depth", "num_classes")
        check_dropout(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        cond: Conditioning,
        train: bool = False,
        features: Sequence[int] = (),
    ) -> Array | tuple[Array, tuple[Array, ...]]:
        """F [B, out_features] of x [B, D] and c_noise [B], in x's dtype; with ``features``, F and
        the residual stream [B, width] after those blocks, which count from 1."""
        if any(not 1 <= i <= self.depth for i in features):
            raise ValueError(f"features={tuple(features)} must be blocks 1..{self.depth}")
        if x.ndim != 2 or time.shape != x.shape[:1]:
            got = f"x has shape {x.shape} and time {time.shape}"
            raise ValueError(f"{got}; expected [B, D] and [B]")
        emb, guidance = sinusoidal(self.time_scale * time, self.width), None
        if self.guidance_width is not None:
            guidance = guidance_sinusoids(cond.guidance, self.guidance_width)
        emb = EmbeddingMLP(self.width, self.dtype, name="time_embedding")(emb, guidance)
        if self.two_times:
            emb = emb + SpanEmbedding(self.width, self.dtype, name="span_embedding")(
                time, cond.span
            )
        if self.num_classes is not None:
            if cond.label is None:
                raise ValueError("cond.label is None, but the network needs it (see num_classes)")
            rows = self.num_classes + self.null_class
            embed = partial(nn.Embed, rows, self.width, self.dtype, embedding_init=normal(1.0))
            emb = emb + embed(name="class_embedding")(cond.label)
        emb = nn.silu(emb)
        dense = partial(nn.Dense, dtype=self.dtype)
        norm = partial(nn.LayerNorm, 1e-6, self.dtype, use_scale=False, use_bias=False)
        h, after = dense(self.width, name="linear_in")(x), []
        for i in range(self.depth):
            m = dense(2 * self.width, name=f"modulation_{i}")(emb)
            scale, shift = jnp.split(m, 2, axis=-1)
            g = norm(name=f"norm_{i}")(h) * (1 + scale) + shift
            g = nn.silu(dense(2 * self.width, name=f"linear_1_{i}")(g))
            g = nn.Dropout(self.dropout, deterministic=not train)(g)
            h = h + dense(self.width, kernel_init=zeros, name=f"linear_2_{i}")(g)
            after.append(h)
        out = dense(self.out_features or x.shape[-1], kernel_init=zeros, name="linear_out")
        out = out(nn.silu(h)).astype(x.dtype)
        return (out, tuple(after[i - 1] for i in features)) if features else out
