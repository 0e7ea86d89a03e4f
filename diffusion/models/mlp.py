"""A residual network for points, [B, D], which is called as the U-Net is."""

from __future__ import annotations

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import normal, zeros

from diffusion.conditioning import Conditioning
from diffusion.levels import Array
from diffusion.models.fields import check_at_least_one, check_dropout, check_even
from diffusion.models.layers import EmbeddingMLP, sinusoidal


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
      dtype: of the computation; parameters and norm statistics are float32.
    """

    width: int = 128
    depth: int = 4
    num_classes: int | None = None
    null_class: bool = True
    time_scale: float = 1.0
    dropout: float = 0.0
    out_features: int | None = None
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        check_even(self, "width")
        check_at_least_one(self, "depth", "num_classes")
        check_dropout(self)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, time: Array, cond: Conditioning, train: bool = False) -> Array:
        """F [B, out_features] of x [B, D] and c_noise [B], in x's dtype."""
        if x.ndim != 2 or time.shape != x.shape[:1]:
            raise ValueError(
                f"x has shape {x.shape} and time {time.shape}; expected [B, D] and [B]"
            )
        emb = sinusoidal(self.time_scale * time, self.width)
        emb = EmbeddingMLP(self.width, self.dtype, name="time_embedding")(emb)
        if self.num_classes is not None:
            if cond.label is None:
                raise ValueError("cond.label is None, but the network needs it (see num_classes)")
            rows, init = self.num_classes + self.null_class, normal(1.0)
            table = nn.Embed(
                rows, self.width, self.dtype, embedding_init=init, name="class_embedding"
            )
            emb = emb + table(cond.label)
        emb = nn.silu(emb)

        def dense(features: int, name: str, init=nn.linear.default_kernel_init) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, kernel_init=init, name=name)

        h = dense(self.width, "linear_in")(x)
        for i in range(self.depth):
            scale, shift = jnp.split(dense(2 * self.width, f"modulation_{i}")(emb), 2, axis=-1)
            g = nn.LayerNorm(
                use_scale=False, use_bias=False, epsilon=1e-6, dtype=self.dtype, name=f"norm_{i}"
            )(h)
            g = nn.silu(dense(2 * self.width, f"linear_1_{i}")(g * (1 + scale) + shift))
            g = nn.Dropout(self.dropout, deterministic=not train)(g)
            h = h + dense(self.width, f"linear_2_{i}", zeros)(g)
        out_features = self.out_features or x.shape[-1]
        return dense(out_features, "linear_out", zeros)(nn.silu(h)).astype(x.dtype)
