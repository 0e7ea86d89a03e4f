"""The fields of U-Nets: what they mean, what fits together, and what each level has by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from diffusion.models.fields import (
    check_at_least_one,
    check_dropout,
    check_even,
    check_image_size,
    check_norm_groups,
    nearest_divisors,
    per_level,
)

AttentionKind = int | Literal["self", "projections"]


class UNetFields(nn.Module):
    """The fields that all networks built on the U-Net's encoder share.

    Levels go from the finest resolution to the coarsest, each half the size of the one before.
    Fields that are "per level" take one value for all levels or a tuple with one for each.

    Attributes:
      widths: channels of each level; their number is the number of levels.
      blocks: ResNet blocks per level.
      attention: what follows each ResNet block, per level: 0 (nothing), 'self' (one self-attention
        over the pixels), n >= 1 (n transformer blocks with cross-attention to ``cond.context``) or
        'projections' (the norm and projections around transformer blocks, without any); a tuple in
        place of a level's entry has one for each ResNet block.
      mid_attention: the same between the ResNet blocks in the middle.
      mid_blocks: number of ResNet blocks in the middle; 0 leaves the middle out.
      num_heads: attention heads, per level. At most one of num_heads and head_width is given;
        with neither there is one head.
      head_width: channels per attention head, per level.
      only_cross_attention: per level (but not in the middle), whether transformer blocks attend to
        the context only.
      linear_projection: transformers' in and out projections are matrices, not 1 x 1 convolutions.
      upcast_attention: transformers' queries, keys and values are float32 whatever dtype is.
      scale_shift: the embedding scales and shifts the second norm (ADM) instead of being added.
      resnet_resampling: ResNet blocks resample (ADM) instead of single convolutions.
      asymmetric_downsampling: strided convolutions are padded by (0, 1), not (1, 1) (DDPM).
      time_width: channels of the embedding; four times the first width by default.
      time_scale: factor on c_noise before the sinusoids (whose shortest period is 2 pi).
      time_cos_first, time_freq_shift: as in ``layers.sinusoidal``.
      num_classes: size of the label embedding, without the null class; None: labels are not used.
      null_class: whether the embedding has a row ``num_classes`` that stands for "no class".
      added_embedding: whether ``cond.time_ids`` (``time_id_width`` channels each) and
        ``cond.pooled``, concatenated, are embedded and added to the time embedding (SDXL).
      time_id_width: sinusoids per time id.
      guidance_width: sinusoids for ``cond.guidance`` (``layers.guidance_sinusoids``); None: not
        used.
      two_times: whether the network is told where it aims, by ``cond.span``.
      dropout: rate within ResNet blocks, when training.
      norm_groups, norm_eps: of the group norms (the eps of transformers' norms is always 1e-6).
      remat: whether the backward pass recomputes each ResNet, attention and transformer block.
      attention_implementation: as in ``kernels.attention.attend``.
      dtype: of the computation; parameters, norm statistics and softmax are float32.
      in_channels, context_width, added_width: channels of x and ``cond.image`` together, of
        ``cond.context``, and of pooled vector and sinusoids together. Other numbers of channels
        are refused; None: any.
      image_size: the image size that suits the network best, where known; it changes nothing.
    """

    widths: Sequence[int] = (128, 256, 256, 256)
    blocks: int | Sequence[int] = 2
    attention: AttentionKind | Sequence[AttentionKind | Sequence[AttentionKind]] = 0
    mid_attention: AttentionKind = "self"
    mid_blocks: int = 2
    num_heads: int | Sequence[int] | None = None
    head_width: int | Sequence[int] | None = None
    only_cross_attention: bool | Sequence[bool] = False
    linear_projection: bool = False
    upcast_attention: bool = False
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
    two_times: bool = False
    dropout: float = 0.0
    norm_groups: int = 32
    norm_eps: float = 1e-5
    remat: bool = False
    attention_implementation: str | None = None
    dtype: jnp.dtype = jnp.float32
    in_channels: int | None = None
    context_width: int | None = None
    added_width: int | None = None
    image_size: int | tuple[int, int] | None = None

    up_attention = None  # a field of ``UNet``

    def __post_init__(self) -> None:
        levels = len(self.widths)
        if levels == 0 or any(width < 2 or width % 2 for width in self.widths):
            raise ValueError(f"widths={self.widths}; expected even widths >= 2, one per level")
        per = ("blocks", "attention", "up_attention", "num_heads", "head_width")
        for field in (*per, "only_cross_attention"):
            value = getattr(self, field)
            if isinstance(value, (tuple, list)) and len(value) != levels:
                raise ValueError(
                    f"{field}={value} has {len(value)} entries; expected one value or {levels}, "
                    f"as many as widths={self.widths}"
                )
        if any(per_level(self.blocks, level) < 1 for level in range(levels)):
            raise ValueError(f"blocks={self.blocks}; expected at least 1 ResNet block per level")
        if self.mid_blocks < 0:
            raise ValueError(f"mid_blocks={self.mid_blocks}; expected at least 0")
        for field, level in self._attention_fields():
            kinds, count = self.level_kinds(field, level), self._count(field, level)
            if len(kinds) != count:
                raise ValueError(
                    f"{field}={getattr(self, field)}: level {level} has {len(kinds)} entries, "
                    f"{kinds}; expected {count}, one for each of its ResNet blocks"
                )
        for kind, _ in self.all_kinds():
            if kind not in ("self", "projections") and not (isinstance(kind, int) and kind >= 0):
                raise ValueError(
                    f"attention={self.attention}, mid_attention={self.mid_attention!r}: {kind!r} "
                    "is neither 0 (none), 'self', 'projections' nor a number of transformer blocks"
                )
        check_norm_groups(self.norm_groups, self.widths)
        if self.num_heads is not None and self.head_width is not None:
            raise ValueError(
                f"num_heads={self.num_heads} and head_width={self.head_width}; give at most one"
            )
        for kind, level in self.all_kinds():
            for field in ("num_heads", "head_width"):
                value, width = per_level(getattr(self, field), level), self.widths[level]
                if kind != 0 and value is not None and (value < 1 or width % value):
                    raise ValueError(
                        f"{field}={getattr(self, field)}: {value} does not divide width {width} of "
                        f"level {level}; nearest: {nearest_divisors(width, value)}"
                    )
        check_at_least_one(self, "num_classes", "in_channels", "context_width", "added_width")
        check_even(self, "time_width", "time_id_width", "guidance_width")
        check_dropout(self)
        super().__post_init__()

    @property
    def halves_exactly(self) -> bool:
        """Whether images must be halved without rest; other networks round up, and cut it off."""
        return self.resnet_resampling or self.asymmetric_downsampling

    def check(self, image_size: int | tuple[int, int]) -> None:
        """Raises ValueError for an ``image_size`` that cannot be halved once per level but the
        last: without rest where it must be, else to at least one pixel of two."""
        sides = image_size if isinstance(image_size, tuple) else (image_size,)
        least = 2 ** (len(self.widths) - 2) + 1 if len(self.widths) > 1 else 1
        if self.halves_exactly:
            check_image_size(image_size, self.widths)
        elif min(sides) < least:
            raise ValueError(
                f"image size {min(sides)} is too small for {len(self.widths)} widths, which halve "
                f"it {len(self.widths) - 1} times; nearest: {least}"
            )

    def level_kinds(self, field: str, level: int) -> tuple[AttentionKind, ...]:
        """What follows each of a level's ResNet blocks, by "attention" or "up_attention"."""
        kind = per_level(getattr(self, field), level)
        many = isinstance(kind, (tuple, list))
        return tuple(kind) if many else (kind,) * self._count(field, level)

    def all_kinds(self) -> Iterator[tuple[AttentionKind, int]]:
        """Every attention layer's kind and level."""
        for field, level in self._attention_fields():
            yield from ((kind, level) for kind in self.level_kinds(field, level))
        if self.mid_blocks > 1:
            yield self.mid_attention, len(self.widths) - 1

    def heads(self, level: int) -> int:
        """Attention heads at a level."""
        if self.num_heads is not None:
            return per_level(self.num_heads, level)
        if self.head_width is not None:
            return self.widths[level] // per_level(self.head_width, level)
        return 1

    def _attention_fields(self) -> Iterator[tuple[str, int]]:
        """Each field that is given, with each level."""
        fields = [f for f in ("attention", "up_attention") if getattr(self, f) is not None]
        yield from ((field, level) for field in fields for level in range(len(self.widths)))

    def _count(self, field: str, level: int) -> int:
        """ResNet blocks of the level's down block, or up block."""
        return per_level(self.blocks, level) + (field == "up_attention")
