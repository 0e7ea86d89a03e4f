"""The KL autoencoder of latent diffusion (Rombach et al., 2022): images to latents and back.

Those of Stable Diffusion 1, 2, XL, 3 and of the x4 upscaler differ in widths, in channels and in
the shift and scale of their latents. Submodules are named after diffusers' keys, with ``_`` for the
dots before numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.attention import SpatialAttention
from diffusion.models.fields import (
    check_at_least_one,
    check_dropout,
    check_image_size,
    check_norm_groups,
    per_level,
)
from diffusion.models.kernels.convolution import three_by_three
from diffusion.models.layers import GroupNorm, Part, Pointwise
from diffusion.models.unet_blocks import (
    Constructor,
    DownBlock,
    Downsample,
    MidBlock,
    ResnetBlock,
    UpBlock,
    Upsample,
)

EPS = 1e-6  # of the group norms; U-Nets have 1e-5
LOG_VARIANCE = (-30.0, 20.0)


class Gaussian(NamedTuple):
    """Independent normal distributions of latents: mean and log variance, each [B, h, w, C]."""

    mean: Array
    log_variance: Array

    def mode(self) -> Array:
        """The most probable latents, which are the mean."""
        return self.mean

    def at(self, z: Array) -> Array:
        """mean + std * z, a sample where z is standard normal."""
        return self.mean + jnp.exp(0.5 * self.log_variance) * z

    def sample(self, key: Array) -> Array:
        """``at`` standard normal numbers from ``key``."""
        return self.at(jax.random.normal(key, self.mean.shape, self.mean.dtype))

    def kl(self) -> Array:
        """[B]: divergence from the standard normal, in nats, summed over an example's latents."""
        variance = jnp.exp(self.log_variance)
        terms = self.mean**2 + variance - 1 - self.log_variance
        return 0.5 * terms.sum((1, 2, 3))


class AutoencoderKL(nn.Module):
    """Encoder of images [B, H, W, in_channels] in [-1, 1] to latents, and decoder of these.

    Levels go from the finest resolution to the coarsest, each half the size of the one before, so
    that latents are smaller by ``factor`` = 2^(levels - 1).

    Attributes:
      widths: channels of each level.
      blocks: ResNet blocks per level of the encoder; the decoder has one more.
      in_channels, out_channels: of images.
      latent_channels: of latents.
      attention: whether self-attention follows every ResNet block of a level: one value or one per
        level.
      mid_attention: self-attention at the lowest resolution, in encoder and decoder.
      quant_conv, post_quant_conv: whether there is a pointwise layer after the encoder, and one
        before the decoder.
      norm_groups: of the group norms.
      scaling_factor, shift_factor, latents_mean, latents_std: numbers of ``to_latents``; mean and
        std are None or have one number per latent channel.
      sample_size: size of the images that the network was trained on; tiles have it by default.
      force_upcast: whether to compute in float32 where dtype is float16, in which SDXL's overflows.
      dropout: rate within ResNet blocks, when training.
      remat: whether the backward pass recomputes each ResNet and attention block.
      attention_implementation: as in ``kernels.attention.attend``.
      dtype: of the computation; parameters, norm statistics and softmax are float32.
    """

    widths: Sequence[int] = (128, 256, 512, 512)
    blocks: int = 2
    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 4
    attention: bool | Sequence[bool] = False
    mid_attention: bool = True
    quant_conv: bool = True
    post_quant_conv: bool = True
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    shift_factor: float = 0.0
    latents_mean: Sequence[float] | None = None
    latents_std: Sequence[float] | None = None
    sample_size: int = 512
    force_upcast: bool = True
    dropout: float = 0.0
    remat: bool = False
    attention_implementation: str | None = None
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        _validate(self)
        super().__post_init__()

    @property
    def factor(self) -> int:
        """Size of images over size of latents."""
        return 2 ** (len(self.widths) - 1)

    @property
    def computation(self) -> jnp.dtype:
        """The dtype of the computation, after ``force_upcast``."""
        upcast = self.force_upcast and jnp.dtype(self.dtype) == jnp.float16
        return jnp.float32 if upcast else self.dtype

    def check(self, image_size: int | Sequence[int]) -> None:
        """Raises ValueError unless ``image_size`` is a multiple of ``factor``."""
        check_image_size(image_size, self.widths)

    def setup(self) -> None:
        dtype = self.computation
        self.encoder = Part(partial(_encode, self))
        self.decoder = Part(partial(_decode, self))
        if self.quant_conv:
            self.quant = Pointwise(2 * self.latent_channels, dtype, name="quant_conv")
        if self.post_quant_conv:
            self.post_quant = Pointwise(self.latent_channels, dtype, name="post_quant_conv")

    def encode(self, x: Array, train: bool = False) -> Gaussian:
        """Distribution, in float32, of the unscaled latents [B, H/f, W/f, latent_channels].

        Images x [B, H, W, in_channels] lie in [-1, 1]; H and W are multiples of f = ``factor``.
        With ``train`` dropout is active; it then needs an rng named "dropout".
        """
        self.check(x.shape[1:3])
        h = self.encoder(x, train)
        if self.quant_conv:
            h = self.quant(h)
        mean, log_variance = jnp.split(h.astype(jnp.float32), 2, axis=-1)
        return Gaussian(mean, jnp.clip(log_variance, *LOG_VARIANCE))

    def decode(self, z: Array, train: bool = False) -> Array:
        """Images [B, H, W, out_channels], about in [-1, 1], of unscaled latents."""
        if self.post_quant_conv:
            z = self.post_quant(z)
        return self.decoder(z, train)

    def __call__(
        self, x: Array, key: Array | None = None, train: bool = False
    ) -> tuple[Array, Gaussian]:
        """Reconstruction of x, from latents drawn with ``key`` or their mode; their Gaussian."""
        latents = self.encode(x, train)
        z = latents.mode() if key is None else latents.sample(key)
        return self.decode(z, train), latents

    def to_latents(self, z: Array) -> Array:
        """(z - shift) / scale: what a diffusion model sees, about of unit variance."""
        shift, scale = _shift_and_scale(self)
        return (z - shift) / scale

    def from_latents(self, latents: Array) -> Array:
        """z = latents * scale + shift: what ``decode`` takes; inverse of ``to_latents``.

        scale is 1 / scaling_factor, times latents_std where that is given; shift is shift_factor,
        or latents_mean where that is given.
        """
        shift, scale = _shift_and_scale(self)
        return latents * scale + shift


def _encode(net: AutoencoderKL, x: Array, train: bool) -> Array:
    """Down blocks, mid block, norm and convolution to twice the latent channels."""
    last = len(net.widths) - 1
    x = _conv(net, net.widths[0], "conv_in")(x)
    for level, width in enumerate(net.widths):
        down = DownBlock(
            _resnet(net, width),
            (_attention(net, per_level(net.attention, level)),) * net.blocks,
            partial(Downsample, asymmetric=True, dtype=net.computation) if level < last else None,
            name=f"down_blocks_{level}",
        )
        x, _ = down(x, None, None, None, train)
    return _output(net, 2 * net.latent_channels, _mid(net, x, train))


def _decode(net: AutoencoderKL, z: Array, train: bool) -> Array:
    """Mid block, up blocks from the coarsest level, norm and convolution to images."""
    x = _mid(net, _conv(net, net.widths[-1], "conv_in")(z), train)
    count = net.blocks + 1
    for k, level in enumerate(reversed(range(len(net.widths)))):
        up = UpBlock(
            _resnet(net, net.widths[level]),
            (_attention(net, per_level(net.attention, level)),) * count,
            partial(Upsample, dtype=net.computation) if level > 0 else None,
            name=f"up_blocks_{k}",
        )
        x = up(x, [None] * count, None, None, None, train)
    return _output(net, net.out_channels, x)


def _mid(net: AutoencoderKL, x: Array, train: bool) -> Array:
    attention = _attention(net, net.mid_attention)
    block = MidBlock(_resnet(net, net.widths[-1]), attention, name="mid_block")
    return block(x, None, None, None, train)


def _resnet(net: AutoencoderKL, width: int) -> Constructor:
    return partial(
        nn.remat(ResnetBlock, static_argnums=(3,)) if net.remat else ResnetBlock,
        width=width,
        groups=net.norm_groups,
        eps=EPS,
        dropout=net.dropout,
        dtype=net.computation,
    )


def _attention(net: AutoencoderKL, present: bool) -> Constructor | None:
    if not present:
        return None
    return partial(
        nn.remat(SpatialAttention) if net.remat else SpatialAttention,
        groups=net.norm_groups,
        eps=EPS,
        implementation=net.attention_implementation,
        dtype=net.computation,
    )


def _conv(net: AutoencoderKL, features: int, name: str) -> nn.Conv:
    form, dtype = three_by_three, net.computation
    return nn.Conv(features, (3, 3), dtype=dtype, conv_general_dilated=form, name=name)


def _output(net: AutoencoderKL, features: int, x: Array) -> Array:
    norm = GroupNorm(net.norm_groups, EPS, net.computation, name="conv_norm_out")
    return _conv(net, features, "conv_out")(nn.silu(norm(x)))


def _shift_and_scale(net: AutoencoderKL) -> tuple[Array, Array]:
    """Both () or [latent_channels]."""
    mean = net.shift_factor if net.latents_mean is None else net.latents_mean
    std = 1.0 if net.latents_std is None else net.latents_std
    return jnp.asarray(mean, jnp.float32), jnp.asarray(std, jnp.float32) / net.scaling_factor


def _validate(net: AutoencoderKL) -> None:
    """Raises ValueError for fields that do not fit together."""
    if not net.widths or min(net.widths) < 1:
        raise ValueError(f"widths={net.widths}; expected at least one level, of widths >= 1")
    counts = ("blocks", "in_channels", "out_channels", "latent_channels", "norm_groups")
    check_at_least_one(net, *counts)
    check_norm_groups(net.norm_groups, net.widths)
    channels = net.latent_channels
    lengths = {"attention": len(net.widths), "latents_mean": channels, "latents_std": channels}
    for field, expected in lengths.items():
        value = getattr(net, field)
        if isinstance(value, (tuple, list)) and len(value) != expected:
            raise ValueError(f"{field}={value} has {len(value)} entries; expected {expected}")
    if net.scaling_factor <= 0:
        raise ValueError(f"scaling_factor={net.scaling_factor}; expected a positive number")
    check_dropout(net)
