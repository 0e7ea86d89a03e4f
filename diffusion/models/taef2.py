"""TAEF2, a small autoencoder with the latents of FLUX.2's (madebyollin/taesd).

Submodules have the numbers of the published layers, with ``_`` for the dots before numbers.
"""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.kernels.convolution import three_by_three
from diffusion.models.layers import GroupNorm

GROUPS = 4


class TAEF2(nn.Module):
    """Pictures [B, H, W, 3] in [-1, 1] to latents [B, H / 8, W / 8, 32], and back.

    H and W are multiples of 8. Latents have no distribution and are about of unit variance.

    Attributes:
      width: channels of all layers.
      latent_channels: of the latents.
      dtype: of the computation; the statistics of norms are in float32.
    """

    width: int = 64
    latent_channels: int = 32
    dtype: jnp.dtype = jnp.float32

    factor = 8

    def setup(self) -> None:
        conv = partial(nn.Conv, kernel_size=(3, 3), padding=1, dtype=self.dtype)
        same = partial(conv, conv_general_dilated=three_by_three)
        block = partial(Block, self.width, dtype=self.dtype)
        down = partial(conv, self.width, strides=2, use_bias=False)
        up = partial(same, self.width, use_bias=False)

        def blocks(count: int, wide: bool = False) -> list[Block]:
            return [block(wide=wide) for _ in range(count)]

        encoder = [same(self.width), *blocks(1), down(), *blocks(3), down(), *blocks(3), down()]
        self.encoder = [*encoder, *blocks(3, wide=True), same(self.latent_channels)]
        decoder = [_bounded, same(self.width), nn.relu, *blocks(3, wide=True)]
        for count in (3, 3, 1):
            decoder += [_doubled, up(), *blocks(count)]
        self.decoder = [*decoder, same(3)]

    def encode(self, x: Array) -> Array:
        """The latents of pictures."""
        return self.stages(x)[-1]

    def stages(self, x: Array) -> tuple[Array, ...]:
        """The activations at 1, 1/2, 1/4 and 1/8 of the picture's sides, then the latents."""
        if x.shape[-1] != 3 or x.shape[1] % self.factor or x.shape[2] % self.factor:
            raise ValueError(
                f"pictures {x.shape}; expected [B, H, W, 3], H and W multiples of {self.factor}"
            )
        x, kept = (x.astype(self.dtype) + 1) / 2, []
        for number, layer in enumerate(self.encoder):
            x = layer(x)
            if number in STAGES:
                kept.append(x)
        return (*kept, x)

    def decode(self, z: Array) -> Array:
        """The pictures of latents, about in [-1, 1]."""
        z = z.astype(self.dtype)
        for layer in self.decoder:
            z = layer(z)
        return 2 * z - 1

    def __call__(self, x: Array) -> Array:
        """The pictures decoded from their latents."""
        return self.decode(self.encode(x))


STAGES = (1, 5, 9, 13)  # the last layer of the encoder at each resolution


class Block(nn.Module):
    """relu(x + f(x)), f three convolutions with relu between, on x [B, H, W, width].

    A wide block first adds two pointwise layers, 4 times as wide between, with a group norm.
    """

    width: int
    wide: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        conv = partial(nn.Conv, dtype=self.dtype)
        if self.wide:
            h = conv(4 * self.width, (1, 1), use_bias=False, name="pool_0")(x)
            h = nn.relu(GroupNorm(GROUPS, dtype=self.dtype, name="pool_1")(h))
            x = x + conv(self.width, (1, 1), use_bias=False, name="pool_3")(h)
        conv = partial(conv, self.width, (3, 3), conv_general_dilated=three_by_three)
        h = nn.relu(conv(name="conv_0")(x))
        h = nn.relu(conv(name="conv_2")(h))
        return nn.relu(x + conv(name="conv_4")(h))


def _bounded(z: Array) -> Array:
    return 3 * jnp.tanh(z / 3)


def _doubled(x: Array) -> Array:
    return jax.image.resize(x, (len(x), 2 * x.shape[1], 2 * x.shape[2], x.shape[3]), "nearest")
