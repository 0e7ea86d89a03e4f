"""The half of the U-Net that ControlNet copies, and the fields that describe both halves.

``Encoder``'s parameters have the same names, at the same depth, in every module built on it.
Names are diffusers' keys, with ``_`` for the dots before numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from diffusion.conditioning import Conditioning
from diffusion.levels import Array
from diffusion.models.attention import SpatialAttention, SpatialTransformer
from diffusion.models.layers import EmbeddingMLP, sinusoidal
from diffusion.models.unet_blocks import (
    Constructor,
    DownBlock,
    Downsample,
    MidBlock,
    ResnetBlock,
    Upsample,
    average_pool,
    nearest_upsample,
)

AttentionKind = int | Literal["self"]


class Encoder(nn.Module):
    """Time embedding, first convolution, down blocks and mid block of a U-Net.

    Levels go from the finest resolution to the coarsest, each half the size of the one before.
    Fields that are "per level" take one value for all levels or a tuple with one for each.

    Attributes:
      widths: channels of each level; their number is the number of levels.
      blocks: ResNet blocks per level.
      attention: what follows each ResNet block, per level: 0 (nothing), 'self' (one self-attention
        over the pixels), or n >= 1 (n transformer blocks with cross-attention to ``cond.context``).
      mid_attention: the same for the block in the middle.
      num_heads: attention heads, per level. At most one of num_heads and head_width is given;
        with neither there is one head.
      head_width: channels per attention head, per level.
      only_cross_attention: per level (but not in the middle), whether transformer blocks attend to
        the context only.
      linear_projection: transformers' in and out projections are matrices, not 1 x 1 convolutions.
      scale_shift: the embedding scales and shifts the second norm (ADM) instead of being added.
      resnet_resampling: ResNet blocks resample (ADM) instead of single convolutions.
      asymmetric_downsampling: pad strided convolutions (0, 1) instead of (1, 1) (DDPM).
      time_width: channels of the embedding; four times the first width by default.
      time_scale: factor on c_noise before the sinusoids (whose shortest period is 2 pi).
      time_cos_first, time_freq_shift: see ``layers.sinusoidal``.
      num_classes: size of the label embedding, without the null class; None: labels are not used.
      null_class: whether the embedding has a row ``num_classes`` that stands for "no class".
      added_embedding: embed ``cond.time_ids`` (``time_id_width`` channels each) and
        ``cond.pooled``, concatenated, and add that to the time embedding (SDXL).
      time_id_width: sinusoids per time id.
      guidance_width: sinusoids for ``cond.guidance`` = s, embedded as 1000 (s - 1), so that
        s = 1, no guidance, is the origin (latent consistency models); None: not used.
      dropout: rate within ResNet blocks, when training.
      norm_groups, norm_eps: of the group norms (the eps of transformers' norms is always 1e-6).
      remat: recompute each ResNet, attention and transformer block in the backward pass.
      attention_implementation: see ``attention.attend``.
      dtype: of the computation; parameters, norm statistics and softmax are float32.

    Raises:
      ValueError: at construction, naming the field that does not fit.
    """

    widths: Sequence[int] = (128, 256, 256, 256)
    blocks: int | Sequence[int] = 2
    attention: AttentionKind | Sequence[AttentionKind] = 0
    mid_attention: AttentionKind = "self"
    num_heads: int | Sequence[int] | None = None
    head_width: int | Sequence[int] | None = None
    only_cross_attention: bool | Sequence[bool] = False
    linear_projection: bool = False
    scale_shift: bool = False
    resnet_resampling: bool = False
    asymmetric_downsampling: bool = False
    time_width: int | None = None
    time_scale: float = 1.0
    time_cos_first: bool = True
    time_freq_shift: float = 0.0
    num_classes: int | None = None
    null_class: bool = True
    added_embedding: bool = False
    time_id_width: int = 256
    guidance_width: int | None = None
    dropout: float = 0.0
    norm_groups: int = 32
    norm_eps: float = 1e-5
    remat: bool = False
    attention_implementation: str | None = None
    dtype: jnp.dtype = jnp.float32

    def __post_init__(self) -> None:
        _validate(self)
        super().__post_init__()

    def check(self, image_size: int | tuple[int, int]) -> None:
        """Raises ValueError unless ``image_size`` can be halved once per level but the last."""
        factor = 2 ** (len(self.widths) - 1)
        sizes = (image_size,) if isinstance(image_size, int) else image_size
        for size in sizes:
            if size < factor or size % factor:
                nearest = max(round(size / factor), 1) * factor
                raise ValueError(
                    f"image size {size} is not divisible by {factor} = 2^(levels - 1) with "
                    f"{len(self.widths)} levels (widths={tuple(self.widths)}); nearest: {nearest}"
                )

    def heads(self, level: int) -> int:
        """Attention heads at a level."""
        if self.num_heads is not None:
            return per_level(self.num_heads, level)
        if self.head_width is not None:
            return self.widths[level] // per_level(self.head_width, level)
        return 1

    def make_resnet(self, level: int) -> Constructor:
        """The ResNet blocks of a level, which still want a name."""
        return partial(
            nn.remat(ResnetBlock, static_argnums=(3,)) if self.remat else ResnetBlock,
            width=self.widths[level],
            groups=self.norm_groups,
            eps=self.norm_eps,
            dropout=self.dropout,
            scale_shift=self.scale_shift,
            dtype=self.dtype,
        )

    def make_attention(self, level: int, mid: bool = False) -> Constructor | None:
        """The attention layers of a level, or the mid block's."""
        kind = self.mid_attention if mid else per_level(self.attention, level)
        if kind == 0:
            return None
        if kind == "self":
            return partial(
                nn.remat(SpatialAttention) if self.remat else SpatialAttention,
                heads=self.heads(level),
                groups=self.norm_groups,
                eps=self.norm_eps,
                implementation=self.attention_implementation,
                dtype=self.dtype,
            )
        return partial(
            SpatialTransformer,
            heads=self.heads(level),
            depth=kind,
            linear_projection=self.linear_projection,
            only_cross_attention=not mid and per_level(self.only_cross_attention, level),
            groups=self.norm_groups,
            remat=self.remat,
            implementation=self.attention_implementation,
            dtype=self.dtype,
        )

    def make_downsample(self, level: int) -> Constructor:
        """What halves a level's resolution."""
        if self.resnet_resampling:
            return partial(self.make_resnet(level), resample=average_pool)
        return partial(Downsample, asymmetric=self.asymmetric_downsampling, dtype=self.dtype)

    def make_upsample(self, level: int) -> Constructor:
        """What doubles a level's resolution."""
        if self.resnet_resampling:
            return partial(self.make_resnet(level), resample=nearest_upsample)
        return partial(Upsample, dtype=self.dtype)

    def setup(self) -> None:
        last = len(self.widths) - 1
        width = self.time_width or 4 * self.widths[0]
        self.conv_in = nn.Conv(self.widths[0], (3, 3), dtype=self.dtype)
        self.time_embedding = EmbeddingMLP(width, self.dtype)
        if self.num_classes is not None:
            self.class_embedding = nn.Embed(
                self.num_classes + self.null_class,
                width,
                embedding_init=nn.initializers.normal(1.0),
                dtype=self.dtype,
            )
        if self.added_embedding:
            self.add_embedding = EmbeddingMLP(width, self.dtype)

        self.down_blocks = [
            DownBlock(
                per_level(self.blocks, level),
                self.make_resnet(level),
                self.make_attention(level),
                self.make_downsample(level) if level < last else None,
            )
            for level in range(last + 1)
        ]
        self.mid_block = MidBlock(self.make_resnet(last), self.make_attention(last, mid=True))

    def embed(self, time: Array, cond: Conditioning) -> Array:
        """[B, time_width]: the sum of the embeddings of time [B], label, added and guidance."""
        sinusoids = partial(
            sinusoidal, cos_first=self.time_cos_first, freq_shift=self.time_freq_shift
        )
        guidance = None
        if self.guidance_width is not None:
            scale = 1000 * (_required(cond, "guidance", "guidance_width") - 1)
            guidance = sinusoidal(scale, self.guidance_width, cos_first=False, freq_shift=1.0)
        emb = self.time_embedding(sinusoids(self.time_scale * time, self.widths[0]), guidance)
        if self.num_classes is not None:
            emb = emb + self.class_embedding(_required(cond, "label", "num_classes"))
        if self.added_embedding:
            added = _required(cond, "pooled", "added_embedding").astype(jnp.float32)
            if cond.time_ids is not None:
                ids = sinusoids(cond.time_ids.reshape(-1), self.time_id_width)
                added = jnp.concatenate([added, ids.reshape(len(added), -1)], axis=-1)
            emb = emb + self.add_embedding(added)
        return emb

    def encode(
        self, x: Array, emb: Array, cond: Conditioning, train: bool, hint: Array | None = None
    ) -> tuple[list[Array], Array]:
        """The features for the skip connections, finest first, and the mid block's output.

        Args:
          x: [B, H, W, C]; ``cond.image``, where there is one, is concatenated to it.
          emb: from ``embed``.
          hint: [B, H, W, widths[0]], added after the first convolution (ControlNet).
        """
        self.check(x.shape[1:3])
        if cond.image is not None:
            if cond.image.shape[:3] != x.shape[:3]:
                raise ValueError(
                    f"cond.image has shape {cond.image.shape}; expected {x.shape[:3]} and channels"
                )
            x = jnp.concatenate([x, cond.image.astype(x.dtype)], axis=-1)
        if any(kind not in (0, "self") for kind in _kinds(self)):
            _required(cond, "context", "attention")
        x = self.conv_in(x)
        if hint is not None:
            x = x + hint.astype(x.dtype)
        features = [x]
        for block in self.down_blocks:
            x, outputs = block(x, emb, cond.context, cond.context_mask, train)
            features.extend(outputs)
        return features, self.mid_block(x, emb, cond.context, cond.context_mask, train)


def per_level(value: Any, level: int) -> Any:
    """The level's entry of a field that holds one value for all levels or a tuple."""
    return value[level] if isinstance(value, (tuple, list)) else value


def _kinds(net: Encoder) -> list[AttentionKind]:
    levels = range(len(net.widths))
    return [*(per_level(net.attention, level) for level in levels), net.mid_attention]


def _required(cond: Conditioning, field: str, because: str) -> Array:
    value = getattr(cond, field)
    if value is None:
        raise ValueError(f"cond.{field} is None, but the network needs it (see its {because})")
    return value


def _validate(net: Encoder) -> None:
    """Raises ValueError for fields that do not fit together."""
    levels = len(net.widths)
    if levels == 0 or any(width < 2 or width % 2 for width in net.widths):
        raise ValueError(f"widths={net.widths}; expected at least one level, of even widths >= 2")
    for field in ("blocks", "attention", "num_heads", "head_width", "only_cross_attention"):
        value = getattr(net, field)
        if isinstance(value, (tuple, list)) and len(value) != levels:
            raise ValueError(
                f"{field}={value} has {len(value)} entries; expected one value or {levels}, "
                f"as many as widths={net.widths}"
            )
    for level in range(levels):
        if per_level(net.blocks, level) < 1:
            raise ValueError(f"blocks={net.blocks}; expected at least 1 ResNet block per level")
    for kind in _kinds(net):
        if kind != "self" and not (isinstance(kind, int) and kind >= 0):
            raise ValueError(
                f"attention={net.attention}, mid_attention={net.mid_attention!r}: {kind!r} is "
                "neither 0 (none), 'self' nor a number of transformer blocks"
            )
    common = math.gcd(*net.widths)
    if net.norm_groups < 1 or common % net.norm_groups:
        raise ValueError(
            f"norm_groups={net.norm_groups} does not divide every one of widths={net.widths}; "
            f"nearest: {_nearest_divisor(common, net.norm_groups)}"
        )
    if net.num_heads is not None and net.head_width is not None:
        raise ValueError(
            f"num_heads={net.num_heads} and head_width={net.head_width}; give at most one"
        )
    for level, kind in [*enumerate(_kinds(net)[:-1]), (levels - 1, net.mid_attention)]:
        for field in ("num_heads", "head_width"):
            value, width = per_level(getattr(net, field), level), net.widths[level]
            if kind != 0 and value is not None and (value < 1 or width % value):
                raise ValueError(
                    f"{field}={getattr(net, field)}: {value} does not divide width {width} of "
                    f"level {level}; nearest: {_nearest_divisor(width, value)}"
                )
    if net.num_classes is not None and net.num_classes < 1:
        raise ValueError(f"num_classes={net.num_classes}; expected None or at least 1")
    for field in ("time_width", "time_id_width", "guidance_width"):
        value = getattr(net, field)
        if value is not None and (value < 2 or value % 2):
            raise ValueError(f"{field}={value}; expected an even number")
    if not 0 <= net.dropout < 1:
        raise ValueError(f"dropout={net.dropout}; expected a rate in [0, 1)")


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
