"""ControlNet (Zhang et al., 2023): a copy of a U-Net's encoder that reads a picture, the hint.

Each of the copy's features passes a 1 x 1 convolution that starts at zero and is added to the
U-Net's own, so that a new ControlNet changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import flax.linen as nn
import jax.numpy as jnp
from jax.nn.initializers import zeros

from diffusion.conditioning import Conditioning
from diffusion.levels import Array
from diffusion.models.layers import Pointwise
from diffusion.models.unet_encoder import Encoder
from diffusion.models.unet_fields import UNetFields


class HintNetwork(nn.Module):
    """The hint [B, H, W, C] -> features [B, H / f, W / f, width], f = 2^(len(widths) - 1).

    3 x 3 convolutions with SiLU between them; every second one doubles the widths and halves the
    resolution. The last one starts at zero.
    """

    width: int
    widths: Sequence[int]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, hint: Array) -> Array:
        def conv(width: int, name: str, **options) -> nn.Conv:
            padding = ((1, 1), (1, 1))
            return nn.Conv(width, (3, 3), padding=padding, dtype=self.dtype, name=name, **options)

        x = nn.silu(conv(self.widths[0], "conv_in")(hint))
        for i, (before, after) in enumerate(zip(self.widths, self.widths[1:])):
            x = nn.silu(conv(before, f"blocks_{2 * i}")(x))
            x = nn.silu(conv(after, f"blocks_{2 * i + 1}", strides=2)(x))
        return conv(self.width, "conv_out", kernel_init=zeros)(x)


class ControlNet(Encoder):
    """Residuals for a U-Net with the same fields; ``Encoder``'s names are the U-Net's.

    Attributes:
      hint_widths: of ``HintNetwork``; one more than halvings from pixels to what the U-Net sees.
      hint_channels: of the hint.
      global_pool: the residuals' means over the picture are added (the "shuffle" ControlNet).
      bgr: the hint's channels are read in the order blue, green, red.
    """

    hint_widths: Sequence[int] = (16, 32, 96, 256)
    hint_channels: int = 3
    global_pool: bool = False
    bgr: bool = False

    @nn.compact
    def __call__(
        self, x: Array, time: Array, cond: Conditioning, hint: Array, train: bool = False
    ) -> list[Array]:
        """What ``UNet`` takes as ``control``: a residual for each skip connection, and for the mid
        block.

        Args:
          x, time, cond, train: as ``UNet``'s.
          hint: [B, H, W, C] in [0, 1], in pixels.

        Raises:
          ValueError: the hint's size is not that of x, times the halvings, or it has other
            channels.
        """
        if hint.shape[-1] != self.hint_channels:
            raise ValueError(
                f"the hint has {hint.shape[-1]} channels; expected "
                f"hint_channels={self.hint_channels}"
            )
        factor = 2 ** (len(self.hint_widths) - 1)
        expected = tuple(factor * side for side in x.shape[1:3])
        if hint.shape[1:3] != expected:
            raise ValueError(
                f"the hint has {hint.shape[1]} x {hint.shape[2]} pixels; for x {x.shape[1:3]} and "
                f"hint_widths={tuple(self.hint_widths)}, which halve it {len(self.hint_widths) - 1}"
                f" times, {expected[0]} x {expected[1]} are expected"
            )
        hint = hint[..., ::-1] if self.bgr else hint
        net = HintNetwork(
            self.widths[0], self.hint_widths, self.dtype, name="controlnet_cond_embedding"
        )
        features, mid = self.encode(x, self.embed(time, cond), cond, train, net(hint))
        outputs = []
        for i, feature in enumerate([*features, mid]):
            name = f"controlnet_down_blocks_{i}" if i < len(features) else "controlnet_mid_block"
            conv = Pointwise(feature.shape[-1], self.dtype, zeros, name=name)
            outputs.append(conv(feature))
        if self.global_pool:
            outputs = [output.mean((1, 2), keepdims=True) for output in outputs]
        return outputs


def controlnet_of(unet: UNetFields, hint_widths: Sequence[int]) -> ControlNet:
    """The ControlNet of a U-Net."""
    shared = {f.name for f in fields(UNetFields)} - {"parent", "name"}
    own = {name: getattr(unet, name) for name in shared}
    return ControlNet(**own, hint_widths=tuple(hint_widths))
