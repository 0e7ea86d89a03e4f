"""Diffusion transformer (DiT; Peebles & Xie, 2022) with adaLN-Zero blocks.

Parameters, with the names of the original code: ``x_embedder``, ``t_embedder``, ``y_embedder``,
``blocks_0`` ... each with ``attn/{qkv,proj}``, ``mlp/{fc1,fc2}`` and ``adaLN_modulation``, and
``final_layer/{adaLN_modulation,linear}``. With ``scan=True`` there is one ``blocks`` whose arrays
have the layer as their first axis; ``stack_blocks`` and ``unstack_blocks`` convert.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import lecun_normal, normal

from diffusion.conditioning import Conditioning
from diffusion.levels import Array
from diffusion.models import positions as pos
from diffusion.models.dit_blocks import Block, FinalLayer
from diffusion.models.fields import check_at_least_one, nearest_divisors
from diffusion.models.layers import EmbeddingMLP, SpanEmbedding, guidance_sinusoids, sinusoidal
from diffusion.models.transformer_layers import MLPS, NORMS, patchify, unpatchify, xavier

SIZES = {
    "S": {"width": 384, "depth": 12, "heads": 6},
    "B": {"width": 768, "depth": 12, "heads": 12},
    "L": {"width": 1024, "depth": 24, "heads": 16},
    "XL": {"width": 1152, "depth": 28, "heads": 16},
}
PATCHES = (2, 4, 8)
BLOCK_FIELDS = (  # that it takes from a DiT
    *("heads", "mlp_ratio", "norm", "mlp", "qk_norm", "dropout", "dtype"),
    *("attention_implementation", "mlp_norm_eps"),
)


def preset(name: str) -> dict[str, int]:
    """Fields width, depth, heads and patch of 'S/2' ... 'XL/8': ``DiT(**preset('XL/2'), ...)``."""
    valid = [f"{size}/{patch}" for size in SIZES for patch in PATCHES]
    if name not in valid:
        raise ValueError(f"unknown DiT preset {name!r}; choose from {', '.join(valid)}")
    size, patch = name.split("/")
    return {**SIZES[size], "patch": int(patch)}


class DiT(nn.Module):
    """Diffusion transformer: (x [B, H, W, C], c_noise [B], cond) -> [B, H, W, C or 2C], float32.

    The output at initialisation is exactly zero. The network ignores fields of cond that it has no
    input for and requires the others. ``cond.image``, if there is one, is concatenated to x along
    the channels.

    Attributes:
      width, depth, heads, patch: sizes; ``preset`` gives the published ones.
      mlp_ratio: hidden width of the MLPs over width.
      num_classes: number of classes that ``cond.label`` counts from 0, with ``num_classes`` itself
        as the null class; 0 for a network without labels.
      learned_variance: whether the output has 2C channels, the second half for variances.
      positions: 'sincos' (fixed, added to the tokens) or 'rotary' (axial, in every attention).
      norm: 'layer' or 'rms', neither with parameters of its own.
      mlp: 'gelu' or 'swiglu'.
      qk_norm: whether queries and keys are RMS-normalised, with a learned scale.
      cross_attention: whether blocks also attend to ``cond.context`` under ``cond.context_mask``.
      pooled: whether ``cond.pooled`` is embedded and added to the time embedding.
      unit_embeddings: whether time and class embeddings start at unit scale, for short runs. From
        the published scale of 0.02 the zero-initialised modulation takes hundreds of steps to
        distinguish them.
      guidance_width: sinusoids for ``cond.guidance`` (``layers.guidance_sinusoids``); None: not
        used.
      two_times: whether the network is told where it aims, by ``cond.span``.
      time_scale: factor on c_noise before the sinusoids (whose shortest period is 2 pi).
      dropout: rate on what each attention and MLP adds, in training.
      dtype: compute type of blocks; embeddings, modulation and the last layer are float32.
      remat: whether the backward pass recomputes blocks instead of storing their activations.
      remat_keeps_products: with ``remat``, dense layers' results are stored, and only what follows
        from them quickly (norms, modulation, activations, attention) is recomputed.
      scan: one compiled block loops over the layers, which compiles faster; parameters are stacked.
      attention_implementation: as in ``kernels.attention.attend``.
      time_freq_shift: as in ``layers.sinusoidal``; 0 in the original code, 1 in diffusers.
      mlp_norm_eps: eps of the norms before the MLPs; 1e-6 in the original code, 1e-5 in diffusers.
      in_channels: channels of x and cond.image together; other inputs are refused. None: any.
      image_size: 'sincos' positions are those of images of this size, stretched to the size of x.
        None: positions count the patches.
    """

    width: int
    depth: int
    heads: int
    patch: int
    mlp_ratio: float = 4.0
    num_classes: int = 0
    learned_variance: bool = False
    positions: str = "sincos"
    norm: str = "layer"
    mlp: str = "gelu"
    qk_norm: bool = False
    cross_attention: bool = False
    pooled: bool = False
    unit_embeddings: bool = False
    guidance_width: int | None = None
    two_times: bool = False
    time_scale: float = 1.0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False
    remat_keeps_products: bool = False
    scan: bool = False
    attention_implementation: str | None = None
    time_freq_shift: float = 0.0
    mlp_norm_eps: float = 1e-6
    in_channels: int | None = None
    image_size: int | None = None

    def __post_init__(self):
        check_at_least_one(self, "depth", "patch")
        valid = {"positions": ("sincos", "rotary"), "norm": tuple(NORMS), "mlp": tuple(MLPS)}
        for name, choices in valid.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}; choose from {choices}")
        # Sinusoids need width / 4 frequencies, rotations head width / 4.
        if self.width < 4 or self.width % 4:
            low = max(4, self.width - self.width % 4)
            raise ValueError(
                f"width={self.width} must be a positive multiple of 4; nearest: {low} or {low + 4}"
            )
        rotary = self.positions == "rotary"
        units = self.width // 4 if rotary else self.width
        if self.heads < 1 or units % self.heads:
            raise ValueError(
                f"heads={self.heads} must divide width={self.width}"
                + (" into heads whose width is a multiple of 4 (rotary)" if rotary else "")
                + f"; nearest: {nearest_divisors(units, self.heads)}"
            )
        super().__post_init__()

    @property
    def feature_blocks(self) -> tuple[int, int]:
        """The number of the last block that ``features`` may name, and of the middle one."""
        return self.depth, (self.depth + 1) // 2

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        cond: Conditioning,
        *,
        train: bool = False,
        features: Sequence[int] = (),
    ) -> Array | tuple[Array, tuple[Array, ...]]:
        """The network's output F; with ``features``, F and the tokens after those blocks.

        ``features=(8,)`` gives ``(F, (tokens,))`` with the 8th block's output tokens
        [B, H/patch, W/patch, width], for representation alignment; blocks count from 1.
        """
        self._check_call(x, cond, features)
        height, width, channels = x.shape[1:]
        grid = (height // self.patch, width // self.patch)
        out = channels * (2 if self.learned_variance else 1)
        if cond.image is not None:
            x = jnp.concatenate([x, cond.image.astype(x.dtype)], axis=-1)

        x = patchify(x.astype(jnp.float32), self.patch)
        x = nn.Dense(self.width, kernel_init=xavier, name="x_embedder")(x)
        rotary = None
        if self.positions == "sincos":
            base = self.image_size and self.image_size // self.patch
            x = x + pos.sincos_2d(*grid, self.width, base=base)[None]
        else:
            rotary = pos.rotary_2d(*grid, self.width // self.heads)
        c = nn.silu(self._embed(time, cond))
        context = context_mask = None
        if self.cross_attention:
            context = EmbeddingMLP(self.width, self.dtype, name="context_embedder")(cond.context)
            context_mask = cond.context_mask

        x, tokens = self._blocks(
            x.astype(self.dtype), (c, rotary, context, context_mask), train, features
        )
        x = FinalLayer(self.patch**2 * out, self.norm, name="final_layer")(x, c)
        x = unpatchify(x, self.patch, height, width)
        if not features:
            return x
        return x, tuple(t.reshape(-1, *grid, self.width) for t in tokens)

    def _embed(self, time: Array, cond: Conditioning) -> Array:
        """Sum [B, width] of the embeddings of time, class and pooled vector."""
        time_init = table_init = normal(0.02)
        if self.unit_embeddings:
            time_init, table_init = lecun_normal(), normal(1.0)
        guidance = None
        if self.guidance_width is not None:
            guidance = guidance_sinusoids(cond.guidance, self.guidance_width)
        c = EmbeddingMLP(self.width, kernel_init=time_init, name="t_embedder")(
            sinusoidal(self.time_scale * time, 256, freq_shift=self.time_freq_shift), guidance
        )
        if self.two_times:
            c = c + SpanEmbedding(self.width, name="span_embedder")(time, cond.span)
        if self.num_classes:
            rows = self.num_classes + 1
            table = nn.Embed(rows, self.width, embedding_init=table_init, name="y_embedder")
            c = c + table(cond.label)
        if self.pooled:
            c = c + EmbeddingMLP(self.width, name="pooled_embedder")(cond.pooled)
        return c

    def _blocks(
        self, x: Array, inputs: tuple, train: bool, features: Sequence[int]
    ) -> tuple[Array, list[Array]]:
        """The tokens after all blocks, and after each of those in ``features``."""
        block, policy = Block, jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        if self.remat:
            policy = policy if self.remat_keeps_products else None
            block = nn.remat(Block, prevent_cse=not self.scan, policy=policy)
        fields = {name: getattr(self, name) for name in BLOCK_FIELDS} | {"train": train}
        if self.scan:

            def body(layer, x, inputs):
                x = layer(x, *inputs)
                return x, x if features else None

            x, after = nn.scan(
                body,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                in_axes=nn.broadcast,
                length=self.depth,
            )(block(**fields, name="blocks"), x, inputs)
            return x, [after[i - 1] for i in features]
        after = [x]
        for i in range(self.depth):
            after.append(block(**fields, name=f"blocks_{i}")(after[-1], *inputs))
        return after[-1], [after[i] for i in features]

    def _check_call(self, x: Array, cond: Conditioning, features: Sequence[int]) -> None:
        if x.ndim != 4:
            raise ValueError(f"DiT takes images [B, H, W, C], got x of shape {x.shape}")
        channels = x.shape[-1] + (0 if cond.image is None else cond.image.shape[-1])
        if self.in_channels not in (None, channels):
            raise ValueError(
                f"x and cond.image have {channels} channels; expected in_channels="
                f"{self.in_channels}"
            )
        height, width = x.shape[1:3]
        if height % self.patch or width % self.patch:
            nearest = [max(round(n / self.patch), 1) * self.patch for n in (height, width)]
            raise ValueError(
                f"image of {height} x {width} is not divisible by patch={self.patch}; nearest: "
                f"{nearest[0]} x {nearest[1]}"
            )
        for used, name, meaning in (
            (self.num_classes, "label", f"[B], with {self.num_classes} for none"),
            (self.cross_attention, "context", "[B, M, features]"),
            (self.pooled, "pooled", "[B, features]"),
        ):
            if used and getattr(cond, name) is None:
                raise ValueError(f"this DiT is conditional: cond.{name} {meaning} is missing")
        if any(not 1 <= i <= self.depth for i in features):
            raise ValueError(f"features={tuple(features)} must be blocks 1..{self.depth}")


def stack_blocks(params: Mapping) -> dict:
    """Parameters of an unrolled DiT -> those of the same network with ``scan=True``."""
    depth = sum(name.startswith("blocks_") for name in params)
    blocks = [params[f"blocks_{i}"] for i in range(depth)]
    rest = {name: value for name, value in params.items() if not name.startswith("blocks_")}
    return {**rest, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)}


def unstack_blocks(params: Mapping) -> dict:
    """Inverse of ``stack_blocks``."""
    rest = {name: value for name, value in params.items() if name != "blocks"}
    depth = len(jax.tree.leaves(params["blocks"])[0])
    for i in range(depth):
        rest[f"blocks_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
    return rest
