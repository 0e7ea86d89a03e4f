"""The half of the U-Net that ControlNet copies, and the fields that describe both halves.

``Encoder``'s parameters have the same names, at the same depth, in every module built on it.
Names are diffusers' keys, with ``_`` for the dots before numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

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
from diffusion.models.unet_fields import AttentionKind, all_kinds, level_kinds, per_level, validate


class Encoder(nn.Module):
    """Time embedding, first convolution, down blocks and mid block of a U-Net.

    Levels go from the finest resolution to the coarsest, each half the size of the one before.
    Fields that are "per level" take one value for all levels or a tuple with one for each.

    Attributes:
      widths: channels of each level; their number is the number of levels.
      blocks: ResNet blocks per level.
      attention: what follows each ResNet block, per level: 0 (nothing), 'self' (one self-attention
        over the pixels), or n >= 1 (n transformer blocks with cross-attention to ``cond.context``);
        a tuple in place of a level's entry has one for each ResNet block.
      mid_attention: the same between the ResNet blocks in the middle.
      mid_blocks: how many ResNet blocks are there; 0 leaves the middle out.
      num_heads: attention heads, per level. At most one of num_heads and head_width is given;
        with neither there is one head.
      head_width: channels per attention head, per level.
      only_cross_attention: per level (but not in the middle), whether transformer blocks attend to
        the context only.
      linear_projection: transformers' in and out projections are matrices, not 1 x 1 convolutions.
      upcast_attention: transformers' queries, keys and values are float32 whatever dtype is.
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
      in_channels, context_width, added_width, image_size: what the network is made for, where that
        is known: channels of x and ``cond.image`` together, of ``cond.context``, of what is added
        (pooled and sinusoids together), and the image size that suits it best. Other channels are
        refused; else these fields change nothing.

    Raises:
      ValueError: at construction, naming the field that does not fit.
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

    def __post_init__(self) -> None:
        validate(self)
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

    @property
    def attends_to_context(self) -> bool:
        """Whether any layer needs ``cond.context``."""
        return any(kind not in (0, "self") for kind, _ in all_kinds(self))

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

    def make_attention(
        self, kind: AttentionKind, level: int, only_cross_attention: bool = False
    ) -> Constructor | None:
        """Attention layers of that kind and of that level's heads, which still want a name."""
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
            only_cross_attention=only_cross_attention,
            groups=self.norm_groups,
            remat=self.remat,
            implementation=self.attention_implementation,
            dtype=self.dtype,
            upcast=self.upcast_attention,
        )

    def make_attentions(
        self, kinds: Sequence[AttentionKind], level: int
    ) -> tuple[Constructor | None, ...]:
        """What follows each of a level's ResNet blocks."""
        only_cross = per_level(self.only_cross_attention, level)
        return tuple(self.make_attention(kind, level, only_cross) for kind in kinds)

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
                self.make_resnet(level),
                self.make_attentions(level_kinds(self, "attention", level), level),
                self.make_downsample(level) if level < last else None,
            )
            for level in range(last + 1)
        ]
        self.mid_block = MidBlock(
            self.make_resnet(last), self.make_attention(self.mid_attention, last), self.mid_blocks
        )

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
            self._check_width("added_width", "cond.pooled and cond.time_ids", added)
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
        self._check_width("in_channels", "x and cond.image", x)
        if self.attends_to_context:
            context = _required(cond, "context", "attention")
            self._check_width("context_width", "cond.context", context)
        x = self.conv_in(x)
        if hint is not None:
            x = x + hint.astype(x.dtype)
        features = [x]
        for block in self.down_blocks:
            x, outputs = block(x, emb, cond.context, cond.context_mask, train)
            features.extend(outputs)
        return features, self.mid_block(x, emb, cond.context, cond.context_mask, train)

    def _check_width(self, field: str, what: str, array: Array) -> None:
        expected = getattr(self, field)
        if expected not in (None, array.shape[-1]):
            raise ValueError(f"{what} have {array.shape[-1]} channels; expected {field}={expected}")


def _required(cond: Conditioning, field: str, because: str) -> Array:
    value = getattr(cond, field)
    if value is None:
        raise ValueError(f"cond.{field} is None, but the network needs it (see its {because})")
    return value
