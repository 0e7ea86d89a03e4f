"""A classifier of noised images: the U-Net's encoder, averaged over the pixels."""

from __future__ import annotations

import flax.linen as nn

from diffusion.conditioning import Conditioning
from diffusion.levels import Array
from diffusion.models.layers import GroupNorm
from diffusion.models.unet_encoder import Encoder


class NoisyClassifier(Encoder):
    """``Encoder``, norm, SiLU, mean over the pixels and one linear layer (Dhariwal & Nichol, 2021,
    section 4, whose pooling is by attention).

    Attributes:
      classes: K, the number of classes. The label is no input: num_classes stays None.
    """

    classes: int = 10

    @nn.compact
    def __call__(self, x: Array, time: Array, cond: Conditioning, train: bool = False) -> Array:
        """Logits [B, K], float32, of x [B, H, W, C] at c_noise [B]."""
        _, h = self.encode(x, self.embed(time, cond), cond, train)
        h = nn.silu(GroupNorm(self.norm_groups, self.norm_eps, self.dtype, name="norm_out")(h))
        return nn.Dense(self.classes, name="logits")(h.mean((1, 2)).astype("float32"))
