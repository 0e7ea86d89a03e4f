"""The half of the U-Net that ControlNet copies.

``Encoder``'s parameters have the same names, at the same depth, in every subclass. Names are
diffusers' keys, with ``_`` for the dots before numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.levels import Array
from diffusion.models.attention import SpatialAttention, SpatialTransformer
from diffusion.models.fields import per_level
from diffusion.models.layers import EmbeddingMLP, SpanEmbedding, guidance_sinusoids, sinusoidal
from diffusion.models.unet_blocks import (
    Constructor,
    DownBlock,
    Downsample,
    MidBlock,
    ResnetBlock,
    Upsample,
    added,
    average_pool,
    nearest_upsample,
)
from diffusion.models.unet_fields import AttentionKind, UNetFields


class Encoder(UNetFields):
    """Time embedding, first convolution, down blocks and mid block of a U-Net."""

    @property
    def attends_to_context(self) -> bool:
        """Whether any layer needs ``cond.context``."""
        return any(kind not in (0, "self", "projections") for kind, _ in self.all_kinds())

    def make_resnet(self, level: int) -> Constructor:
        """Constructor of a level's ResNet blocks; its caller gives the name."""
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
        """Constructor of attention layers of this kind at this level; its caller gives the name."""
        if kind == 0:
            return None
        common = dict(
            heads=self.heads(level),
            groups=self.norm_groups,
            implementation=self.attention_implementation,
            dtype=self.dtype,
        )
        if kind == "self":
            attention = nn.remat(SpatialAttention) if self.remat else SpatialAttention
            return partial(attention, eps=self.norm_eps, **common)
        return partial(
            SpatialTransformer,
            depth=0 if kind == "projections" else kind,
            linear_projection=self.linear_projection,
            only_cross_attention=only_cross_attention,
            remat=self.remat,
            upcast=self.upcast_attention,
            **common,
        )

    def make_attentions(
        self, kinds: Sequence[AttentionKind], level: int
    ) -> tuple[Constructor | None, ...]:
        """Constructors of the attention after each of a level's ResNet blocks; None for none."""
        only_cross = per_level(self.only_cross_attention, level)
        return tuple(self.make_attention(kind, level, only_cross) for kind in kinds)

    def make_resampling(self, level: int, up: bool) -> Constructor:
        """Constructor of the layer that doubles or halves a level's resolution."""
        if self.resnet_resampling:
            resample = nearest_upsample if up else average_pool
            return partial(self.make_resnet(level), resample=resample)
        if up:
            return partial(Upsample, dtype=self.dtype)
        return partial(Downsample, asymmetric=self.asymmetric_downsampling, dtype=self.dtype)

    def setup(self) -> None:
        last = len(self.widths) - 1
        width = self.time_width or 4 * self.widths[0]
        self.conv_in = nn.Conv(self.widths[0], (3, 3), dtype=self.dtype)
        self.time_embedding = EmbeddingMLP(width, self.dtype)
        if self.two_times:
            self.span_embedding = SpanEmbedding(width, self.dtype)
        if self.num_classes is not None:
            rows, init = self.num_classes + self.null_class, nn.initializers.normal(1.0)
            self.class_embedding = nn.Embed(rows, width, self.dtype, embedding_init=init)
        if self.added_embedding:
            self.add_embedding = EmbeddingMLP(width, self.dtype)

        self.down_blocks = [
            DownBlock(
                self.make_resnet(level),
                self.make_attentions(self.level_kinds("attention", level), level),
                self.make_resampling(level, up=False) if level < last else None,
            )
            for level in range(last + 1)
        ]
        self.mid_block = MidBlock(
            self.make_resnet(last), self.make_attention(self.mid_attention, last), self.mid_blocks
        )

    def embed(self, time: Array, cond: Conditioning) -> Array:
        """[B, time_width]: the sum of the embeddings of time [B], label, added and guidance."""
        cos_first, shift = self.time_cos_first, self.time_freq_shift
        sinusoids = partial(sinusoidal, cos_first=cos_first, freq_shift=shift)
        guidance = None
        if self.guidance_width is not None:
            guidance = guidance_sinusoids(cond.guidance, self.guidance_width)
        emb = self.time_embedding(sinusoids(self.time_scale * time, self.widths[0]), guidance)
        if self.two_times:
            emb = emb + self.span_embedding(time, cond.span)
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
        self,
        x: Array,
        emb: Array,
        cond: Conditioning,
        train: bool,
        hint: Array | None = None,
        extras: Sequence[Array] = (),
    ) -> tuple[list[Array], Array]:
        """The features for the skip connections, finest first, and the mid block's output.

        ``cond.image``, if there is one, is concatenated to x [B, H, W, C]. ``hint``
        [B, H, W, widths[0]] is added after the first convolution (ControlNet), ``extras`` within
        the levels and, if there is one more, to the mid block's output (T2I-Adapter).
        """
        self.check(x.shape[1:3])
        levels = len(self.widths)
        if len(extras) not in (0, levels, levels + 1):
            raise ValueError(
                f"{len(extras)} features are to be added; expected one for each of the {levels} "
                "levels, and perhaps one for the mid block"
            )
        extras = [*extras, *[None] * (levels + 1 - len(extras))]
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
        for block, extra in zip(self.down_blocks, extras):
            x, outputs = block(x, emb, cond.context, cond.context_mask, train, extra)
            features.extend(outputs)
        x = self.mid_block(x, emb, cond.context, cond.context_mask, train)
        return features, added(x, extras[-1])

    @property
    def feature_blocks(self) -> tuple[int, int]:
        """The number of the last block that ``features`` may name, and of the middle one."""
        return (len(self.widths) + 1,) * 2

    def outputs(self, skips: list[Array], mid: Array, blocks: Sequence[int]) -> tuple[Array, ...]:
        """Of what ``encode`` gives, the outputs [B, h, w, C] of these blocks: 1 to L are the levels
        (before downsampling), L + 1 is the mid block."""
        levels = len(self.widths)
        if any(not 1 <= i <= levels + 1 for i in blocks):
            raise ValueError(f"features={tuple(blocks)} must be blocks 1..{levels + 1}")
        ends = np.cumsum([per_level(self.blocks, level) + 1 for level in range(levels)]) - 1
        outputs = (*(skips[end] for end in ends), mid)
        return tuple(outputs[i - 1] for i in blocks)

    def _check_width(self, field: str, what: str, array: Array) -> None:
        expected = getattr(self, field)
        if expected not in (None, array.shape[-1]):
            raise ValueError(f"{what} have {array.shape[-1]} channels; expected {field}={expected}")


def _required(cond: Conditioning, field: str, because: str) -> Array:
    value = getattr(cond, field)
    if value is None:
        raise ValueError(f"cond.{field} is None, but the network needs it (see its {because})")
    return value
