"""The U-Net of DDPM, ADM and Stable Diffusion (Ho et al., 2020; Dhariwal & Nichol, 2021;
Rombach et al., 2022): one module, whose fields make the difference, and the published presets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
from jax.nn.initializers import zeros

from diffusion.conditioning import Conditioning
from diffusion.levels import Array
from diffusion.models.fields import per_level
from diffusion.models.layers import GroupNorm
from diffusion.models.unet_blocks import UpBlock
from diffusion.models.unet_encoder import Encoder
from diffusion.models.unet_fields import AttentionKind


class UNet(Encoder):
    """``Encoder``, up blocks and output layers; the output convolution starts at zero.

    Attributes:
      out_channels: of the output; by default those of x. Learned variances need twice as many.
      up_attention: like ``attention``, for the up blocks, which have one more ResNet block each; by
        default each has at all places the attention after the down block's last ResNet block.
    """

    out_channels: int | None = None
    up_attention: AttentionKind | Sequence[AttentionKind | Sequence[AttentionKind]] | None = None

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        cond: Conditioning,
        train: bool = False,
        control: Sequence[Array] | None = None,
        *,
        control_levels: Sequence[Array] = (),
        features: Sequence[int] = (),
    ) -> Array | tuple[Array, tuple[Array, ...]]:
        """F [B, H, W, out_channels], in x's dtype; with ``features``, F and these blocks' outputs.

        Args:
          x: [B, H, W, C], H and W divisible by 2^(levels - 1).
          time: [B], c_noise.
          cond: the network ignores signals that it has no input for and requires the others.
          train: whether dropout is active (it then needs an rng named 'dropout').
          control: residuals to add to the features of the skip connections, in the encoder's
            order, and, last, to the mid block's output (ControlNet).
          control_levels: features to add within each level's down block and, if there is one more,
            to the mid block's output (T2I-Adapter).
          features: numbers of blocks whose outputs [B, h, w, C] are returned as well, for
            representation alignment: 1 to L are the levels' down blocks (before their
            downsampling), L + 1 is the mid block.
        """
        if time.shape != x.shape[:1]:
            raise ValueError(
                f"time has shape {time.shape}; expected {x.shape[:1]}, one per example"
            )
        channels, dtype, levels = self.out_channels or x.shape[-1], x.dtype, len(self.widths)
        emb = self.embed(time, cond)
        skips, x = self.encode(x, emb, cond, train, extras=control_levels)
        outputs = self.outputs(skips, x, features)
        if control is not None:
            if len(control) != len(skips) + 1:
                raise ValueError(
                    f"control holds {len(control)} residuals; expected {len(skips)} for the "
                    "skip connections and one for the mid block"
                )
            skips = [f + c.astype(f.dtype) for f, c in zip(skips, control[:-1])]
            x = x + control[-1].astype(x.dtype)

        for i, level in enumerate(reversed(range(levels))):
            count = per_level(self.blocks, level) + 1
            skips, last = skips[:-count], skips[-count:]
            block = UpBlock(
                self.make_resnet(level),
                self.make_attentions(self.up_kinds(level), level),
                self.make_resampling(level, up=True) if level > 0 else None,
                name=f"up_blocks_{i}",
            )
            size = skips[-1].shape[1:3] if level > 0 else None
            size = None if self.halves_exactly else size
            x = block(x, last, emb, cond.context, cond.context_mask, train, size)

        x = GroupNorm(self.norm_groups, self.norm_eps, self.dtype, name="conv_norm_out")(x)
        conv = nn.Conv(channels, (3, 3), dtype=self.dtype, kernel_init=zeros, name="conv_out")
        out = conv(nn.silu(x)).astype(dtype)
        return (out, outputs) if features else out

    def up_kinds(self, level: int) -> tuple[AttentionKind, ...]:
        """The kind of attention after each ResNet block of the level's up block."""
        if self.up_attention is not None:
            return self.level_kinds("up_attention", level)
        return (self.level_kinds("attention", level)[-1],) * (per_level(self.blocks, level) + 1)


# Published networks; ``overrides`` are fields of UNet. The number of input channels is no field: it
# is that of x and cond.image together.


def ddpm_cifar10(**overrides: Any) -> UNet:
    """DDPM at 32 x 32 (Ho et al., 2020): 35.7 M parameters."""
    fields = dict(
        widths=(128, 256, 256, 256),
        attention=(0, "self", 0, 0),
        asymmetric_downsampling=True,
        time_cos_first=False,
        time_freq_shift=1.0,
        dropout=0.1,
        norm_eps=1e-6,
        out_channels=3,
    )
    return UNet(**fields | overrides)


def adm64(**overrides: Any) -> UNet:
    """ADM, class-conditional ImageNet at 64 x 64 (Dhariwal & Nichol, 2021): 296 M parameters.

    The published networks learn their variances and have no null class: for classifier-free
    guidance, override ``null_class=True``.
    """
    fields = dict(
        widths=(192, 384, 576, 768),
        blocks=3,
        attention=(0, "self", "self", "self"),
        head_width=64,
        scale_shift=True,
        resnet_resampling=True,
        num_classes=1000,
        null_class=False,
        dropout=0.1,
        out_channels=6,
    )
    return UNet(**fields | overrides)


def adm256(**overrides: Any) -> UNet:
    """ADM, class-conditional ImageNet at 256 x 256: 554 M parameters (1 M less without classes)."""
    widths, attention = (256, 256, 512, 512, 1024, 1024), (0, 0, 0, "self", "self", "self")
    return adm64(**dict(widths=widths, blocks=2, attention=attention, dropout=0.0) | overrides)


def sd15(**overrides: Any) -> UNet:
    """Stable Diffusion 1.x: context [B, 77, 768].

    Its inpainting network has 5 further channels in ``cond.image``; latent consistency models have
    ``guidance_width=256``.
    """
    widths, attention = (320, 640, 1280, 1280), (1, 1, 1, 0)
    fields = dict(widths=widths, attention=attention, mid_attention=1, num_heads=8, out_channels=4)
    return UNet(**fields | overrides)


def sd21(**overrides: Any) -> UNet:
    """Stable Diffusion 2.x: context [B, 77, 1024]."""
    return sd15(**dict(num_heads=None, head_width=64, linear_projection=True) | overrides)


def sdxl(**overrides: Any) -> UNet:
    """SDXL's base model: context [B, 77, 2048], pooled [B, 1280], time_ids [B, 6]."""
    levels = dict(widths=(320, 640, 1280), attention=(0, 2, 10), mid_attention=10)
    return sd21(**levels | dict(added_embedding=True) | overrides)


def sdxl_refiner(**overrides: Any) -> UNet:
    """SDXL's refiner: context [B, 77, 1280], pooled [B, 1280], time_ids [B, 5]."""
    levels = dict(widths=(384, 768, 1536, 1536), attention=(0, 4, 4, 0), mid_attention=4)
    return sdxl(**levels | overrides)


def x4_upscaler(**overrides: Any) -> UNet:
    """Stable Diffusion's x4 upscaler: context [B, 77, 1024], the small image [B, H, W, 3] in
    ``cond.image`` and its noise level, 0..999, in ``cond.label``."""
    fields = dict(
        widths=(256, 512, 512, 1024),
        attention=(0, 1, 1, 1),
        only_cross_attention=(True, True, True, False),
        linear_projection=True,
        num_classes=1000,
        null_class=False,
    )
    return sd15(**fields | overrides)
