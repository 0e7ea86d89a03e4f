"""CLIP's transformers: the text encoder of latent diffusion, and the image encoder.

Radford et al., 2021, "Learning Transferable Visual Models From Natural Language Supervision".
Submodules are named after transformers' keys, with ``_`` for the dots before numbers; parameters
start as transformers' do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn.initializers import normal

from diffusion.levels import Array
from diffusion.models.attention import Attend
from diffusion.models.fields import check_heads
from diffusion.models.layers import LayerNorm, Part


def quick_gelu(x: Array) -> Array:
    """x sigmoid(1.702 x), OpenAI's approximation of the gelu."""
    return x * jax.nn.sigmoid(1.702 * x)


def gelu(x: Array) -> Array:
    """The exact gelu, x Phi(x)."""
    return jax.nn.gelu(x, approximate=False)


ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"quick_gelu": quick_gelu, "gelu": gelu}


class Encoded(NamedTuple):
    """The outputs of a CLIP encoder for texts or images.

    Attributes:
      last: [B, L, D] the last layer's output; a text's after the final norm, an image's before it.
      hidden: depth + 1 times [B, L, D]: the input of the first layer, then each layer's output,
        without the final norm. The penultimate layer is ``hidden[-2]``.
      pooled: [B, D] the end token of a text, the class token of an image, after the final norm.
      projected: [B, P] ``pooled`` projected into the space that texts and images share; None for
        an encoder without a projection.
    """

    last: Array
    hidden: tuple[Array, ...]
    pooled: Array
    projected: Array | None


class ClipText(nn.Module):
    """CLIP's text encoder, a causal transformer.

    Attributes:
      vocab_size: number of tokens.
      width: of the tokens' embeddings.
      depth, heads, hidden: layers, attention heads, width inside the MLPs.
      length: largest number of tokens in a text.
      activation: "quick_gelu" (OpenAI's) or "gelu" (OpenCLIP's).
      end: the token that ends a text; None takes the largest token of each text, as OpenAI does,
        whose end token is the last of the vocabulary.
      projection: width of the projected embedding; None: there is none.
      eps: of the norms.
      remat: whether the backward pass recomputes the layers, to save memory.
      implementation: of the attention, as in ``kernels.attention.attend``.
      dtype: of the computation; norms and softmax are in float32.
    """

    vocab_size: int = 49_408
    width: int = 512
    depth: int = 12
    heads: int = 8
    hidden: int = 2048
    length: int = 77
    activation: str = "quick_gelu"
    end: int | None = None
    projection: int | None = None
    eps: float = 1e-5
    remat: bool = False
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32

    causal = True

    def setup(self) -> None:
        _check(self)
        self.embeddings = Part(partial(_embed, self))
        self.encoder = Part(partial(_layers, self))
        self.final_layer_norm = LayerNorm(epsilon=self.eps, dtype=self.dtype)
        if self.projection is not None:
            self.text_projection = _projection(self)

    def __call__(self, ids: Array, mask: Array | None = None) -> Encoded:
        """Encodes texts.

        Args:
          ids: [B, L] int tokens, each text with an end token, L at most ``length``.
          mask: [B, L] bool, True where a token is attended to. Stable Diffusion has no mask: its
            tokens also attend to the padding before them.
        """
        hidden = self.encoder(self.embeddings(ids), mask)
        last = self.final_layer_norm(hidden[-1])
        ends = ids if self.end is None else ids == self.end
        at = jnp.argmax(ends, axis=1)
        pooled = jnp.take_along_axis(last, at[:, None, None], axis=1)[:, 0]
        projected = None if self.projection is None else self.text_projection(pooled)
        return Encoded(last, hidden, pooled, projected)

    def norm(self, hidden: Array) -> Array:
        """The final norm of any layer's output [B, L, D] (clip skip)."""
        return self.final_layer_norm(hidden)


class ClipVision(nn.Module):
    """CLIP's image encoder, a vision transformer with a class token.

    Attributes:
      size: side of the images, in pixels.
      patch: side of the patches, in pixels.
      channels: channels of the images.

    The other fields are those of ``ClipText``.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    hidden: int = 3072
    size: int = 224
    patch: int = 32
    channels: int = 3
    activation: str = "quick_gelu"
    projection: int = 512
    eps: float = 1e-5
    remat: bool = False
    implementation: str | None = None
    dtype: jnp.dtype = jnp.float32

    causal = False

    def setup(self) -> None:
        _check(self)
        self.embeddings = PatchEmbeddings(self.size, self.patch, self.width, self.dtype)
        self.pre_layrnorm = LayerNorm(epsilon=self.eps, dtype=self.dtype)  # transformers' spelling
        self.encoder = Part(partial(_layers, self))
        self.post_layernorm = LayerNorm(epsilon=self.eps, dtype=self.dtype)
        self.visual_projection = _projection(self)

    def __call__(self, images: Array) -> Encoded:
        """Encodes images [B, size, size, channels], normalised with CLIP's mean and deviation."""
        expected = (self.size, self.size, self.channels)
        if images.shape[1:] != expected:
            raise ValueError(f"images {images.shape}; expected (B, {str(expected)[1:]}")
        hidden = self.encoder(self.pre_layrnorm(self.embeddings(images)))
        pooled = self.post_layernorm(hidden[-1][:, 0])
        return Encoded(hidden[-1], hidden, pooled, self.visual_projection(pooled))


Clip = ClipText | ClipVision


class ClipPair(nn.Module):
    """Both encoders of CLIP, which project texts and images into one space.

    Attributes:
      text, vision: the encoders, of equal projections.
    """

    text: ClipText
    vision: ClipVision

    def setup(self) -> None:
        if self.text.projection != self.vision.projection:
            raise ValueError(
                f"texts are projected to {self.text.projection} numbers, images to "
                f"{self.vision.projection}; expected the same"
            )
        self.scale = self.param("logit_scale", nn.initializers.constant(2.6592), ())

    def see(self, images: Array) -> Array:
        """Embeddings [B, P] of images, as in ``ClipVision``."""
        return self.vision(images).projected

    def read(self, ids: Array) -> Array:
        """Embeddings [B, P] of texts, as in ``ClipText``."""
        return self.text(ids).projected

    def __call__(self, ids: Array, images: Array) -> Array:
        """Logits [N, M] of N images and M texts: cosines times exp(logit_scale)."""
        seen, read = self.see(images), self.read(ids)
        seen, read = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (seen, read))
        return jnp.exp(self.scale) * seen @ read.T


class PatchEmbeddings(nn.Module):
    """A class token and patches of images [B, S, S, 3] with their positions: [B, 1 + N, D]."""

    size: int
    patch: int
    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, images: Array) -> Array:
        sides, init = (self.patch, self.patch), normal(0.02)
        patches = nn.Conv(
            self.width,
            sides,
            sides,
            "VALID",
            use_bias=False,
            kernel_init=init,
            dtype=self.dtype,
            name="patch_embedding",
        )(images)
        first = self.param("class_embedding", normal(self.width**-0.5), (self.width,))
        first = jnp.broadcast_to(first.astype(self.dtype), (len(images), 1, self.width))
        tokens = jnp.concatenate([first, patches.reshape(len(images), -1, self.width)], axis=1)
        count, name = (self.size // self.patch) ** 2 + 1, "position_embedding"
        positions = nn.Embed(count, self.width, self.dtype, embedding_init=init, name=name)
        return tokens + positions(jnp.arange(count))[None]


def _embed(net: ClipText, ids: Array) -> Array:
    """Embeddings of tokens [B, L] and of their positions, added up."""
    if ids.shape[1] > net.length:
        raise ValueError(f"{ids.shape[1]} tokens; the text encoder takes at most {net.length}")
    embed = partial(nn.Embed, features=net.width, dtype=net.dtype, embedding_init=normal(0.02))
    tokens = embed(net.vocab_size, name="token_embedding")(ids)
    positions = jnp.arange(ids.shape[1])
    return tokens + embed(net.length, name="position_embedding")(positions)[None]


def _layers(net: Clip, x: Array, mask: Array | None = None) -> tuple[Array, ...]:
    """``Encoded.hidden`` of the embeddings x [B, L, D]."""
    layer, states = nn.remat(Part) if net.remat else Part, [x]
    for i in range(net.depth):
        states.append(layer(partial(_layer, net), name=f"layers_{i}")(states[-1], mask))
    return tuple(states)


def _layer(net: Clip, x: Array, mask: Array | None) -> Array:
    """Pre-norm attention and MLP on x [B, L, D]."""
    norm = partial(LayerNorm, epsilon=net.eps, dtype=net.dtype)
    h = norm(name="layer_norm1")(x)
    x = x + Part(partial(_attention, net), name="self_attn")(h, mask)
    return x + Part(partial(_mlp, net), name="mlp")(norm(name="layer_norm2")(x))


def _attention(net: Clip, x: Array, mask: Array | None) -> Array:
    def project(name: str) -> Array:
        y = _dense(net, net.width, (2 * net.width * net.depth) ** -0.5, name)(x)
        return y.reshape(*x.shape[:-1], net.heads, -1)

    q, k, v = project("q_proj"), project("k_proj"), project("v_proj")
    attend = Attend(True, net.implementation, name="attend")
    out = attend(q, k, v, mask, causal=net.causal).reshape(x.shape)
    return _dense(net, net.width, net.width**-0.5, "out_proj")(out)


def _mlp(net: Clip, x: Array) -> Array:
    h = _dense(net, net.hidden, (2 * net.width) ** -0.5, "fc1")(x)
    h = ACTIVATIONS[net.activation](h)
    return _dense(net, net.width, (2 * net.width * net.depth) ** -0.5, "fc2")(h)


def _dense(net: Clip, features: int, deviation: float, name: str) -> nn.Dense:
    return nn.Dense(features, kernel_init=normal(deviation), dtype=net.dtype, name=name)


def _projection(net: Clip) -> nn.Dense:
    init = normal(net.width**-0.5)
    return nn.Dense(net.projection, use_bias=False, kernel_init=init, dtype=net.dtype)


def _check(net: Clip) -> None:
    """Raises ValueError for fields that do not fit together."""
    check_heads(net)
    if net.activation not in ACTIVATIONS:
        raise ValueError(f"activation={net.activation!r}; expected {' or '.join(ACTIVATIONS)}")
