"""A classifier of noised images: the U-Net's encoder, averaged over the pixels."""

from __future__ import annotations

from collections.abc import Sequence

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
    def __call__(
        self,
        x: Array,
        time: Array,
        cond: Conditioning,
        train: bool = False,
        features: Sequence[int] = (),
    ) -> Array | tuple[Array, tuple[Array, ...]]:
        """Logits [B, K], float32, of x [B, H, W, C] at c_noise [B]; with ``features``, logits and
        these blocks' outputs (see ``Encoder.outputs``)."""
        skips, h = self.encode(x, self.embed(time, cond), cond, train)
        outputs = self.outputs(skips, h, features)
        h = nn.silu(GroupNorm(self.norm_groups, self.norm_eps, self.dtype, name="norm_out")(h))
        logits = nn.Dense(self.classes, name="logits")(h.mean((1, 2)).astype("float32"))
        return (logits, outputs) if features else logits
