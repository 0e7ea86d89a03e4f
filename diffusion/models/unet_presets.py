"""Published U-Nets, as functions; ``overrides`` are fields of ``UNet``.

The number of input channels is that of x and ``cond.image`` together and no field.
"""

from __future__ import annotations

from typing import Any

from diffusion.models.unet import UNet


def ddpm_cifar10(**overrides: Any) -> UNet:
    """DDPM at 32 x 32 (Ho et al., 2020): 35.7 M parameters."""
    net = UNet(
        widths=(128, 256, 256, 256),
        attention=(0, "self", 0, 0),
        asymmetric_downsampling=True,
        time_cos_first=False,
        time_freq_shift=1.0,
        dropout=0.1,
        norm_eps=1e-6,
        out_channels=3,
    )
    return net.clone(**overrides)


def _adm(widths: tuple[int, ...], blocks: int, attention: tuple[int | str, ...]) -> UNet:
    return UNet(
        widths=widths,
        blocks=blocks,
        attention=attention,
        head_width=64,
        scale_shift=True,
        resnet_resampling=True,
        time_width=4 * widths[0],
        num_classes=1000,
        null_class=False,
        out_channels=6,
    )


def adm64(**overrides: Any) -> UNet:
    """ADM, class-conditional ImageNet at 64 x 64 (Dhariwal & Nichol, 2021): 296 M parameters.

    The published networks learn their variances and have no null class: for classifier-free
    guidance, override ``null_class=True``.
    """
    net = _adm((192, 384, 576, 768), 3, (0, "self", "self", "self"))
    return net.clone(dropout=0.1).clone(**overrides)


def adm256(**overrides: Any) -> UNet:
    """ADM, class-conditional ImageNet at 256 x 256: 554 M parameters (1 M less without classes)."""
    attention = (0, 0, 0, "self", "self", "self")
    return _adm((256, 256, 512, 512, 1024, 1024), 2, attention).clone(**overrides)


def sd15(**overrides: Any) -> UNet:
    """Stable Diffusion 1.x: context [B, 77, 768].

    Its inpainting network takes 5 further channels in ``cond.image``; latent consistency models
    have ``guidance_width=256``.
    """
    net = UNet(
        widths=(320, 640, 1280, 1280),
        attention=(1, 1, 1, 0),
        mid_attention=1,
        num_heads=8,
        out_channels=4,
    )
    return net.clone(**overrides)


def sd21(**overrides: Any) -> UNet:
    """Stable Diffusion 2.x: context [B, 77, 1024]."""
    net = UNet(
        widths=(320, 640, 1280, 1280),
        attention=(1, 1, 1, 0),
        mid_attention=1,
        head_width=64,
        linear_projection=True,
        out_channels=4,
    )
    return net.clone(**overrides)


def sdxl(**overrides: Any) -> UNet:
    """SDXL's base model: context [B, 77, 2048], pooled [B, 1280], time_ids [B, 6]."""
    net = UNet(
        widths=(320, 640, 1280),
        attention=(0, 2, 10),
        mid_attention=10,
        head_width=64,
        linear_projection=True,
        added_embedding=True,
        out_channels=4,
    )
    return net.clone(**overrides)


def sdxl_refiner(**overrides: Any) -> UNet:
    """SDXL's refiner: context [B, 77, 1280], pooled [B, 1280], time_ids [B, 5]."""
    net = UNet(
        widths=(384, 768, 1536, 1536),
        attention=(0, 4, 4, 0),
        mid_attention=4,
        head_width=64,
        linear_projection=True,
        added_embedding=True,
        out_channels=4,
    )
    return net.clone(**overrides)


def x4_upscaler(**overrides: Any) -> UNet:
    """Stable Diffusion's x4 upscaler: context [B, 77, 1024], the small image [B, H, W, 3] in
    ``cond.image`` and its noise level, 0..999, in ``cond.label``."""
    net = UNet(
        widths=(256, 512, 512, 1024),
        attention=(0, 1, 1, 1),
        mid_attention=1,
        num_heads=8,
        only_cross_attention=(True, True, True, False),
        linear_projection=True,
        num_classes=1000,
        null_class=False,
        out_channels=4,
    )
    return net.clone(**overrides)
