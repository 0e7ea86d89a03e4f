"""A network that edits pictures, made of one that draws them (InstructPix2Pix; Brooks et al., 2023,
section 3.2).

Its first layer takes the picture to edit beside x. The new half of that layer's kernel is zero at
first, so that the network computes what it did before; then all of the network is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict

from diffusion.adapters.adapter import Params
from diffusion.adapters.full import Full, full
from diffusion.levels import Array
from diffusion.models.surroundings import image_network, with_image_network

FIRST = ("conv_in/kernel", "x_embedder/kernel")
"""The first layer of a U-Net, [3, 3, C, width], and of a transformer, [patch^2 C, width]."""


@dataclass(frozen=True)
class Instruct(Full):
    """New values for the parameters whose paths match ``what``, and a first layer twice as wide.

    Attributes:
      channels: C of x, which a transformer's patches do not tell; 0: the first layer's own.
    """

    channels: int = 0
    edits: ClassVar[bool] = True

    def network(self, network: nn.Module) -> nn.Module:
        """The network whose first layer takes x and ``cond.image``, of as many channels."""
        inner = image_network(network)
        if inner.in_channels is None:  # it takes any number
            return network
        return with_image_network(network, inner.clone(in_channels=2 * inner.in_channels))

    def init(self, key: Array, base: Params) -> Params:
        """{path: value}, in float32."""
        path = first_layer(base)
        chosen = super().init(key, base)
        return chosen | {path: widened(flatten_dict(base, sep="/")[path], self.channels)}


def widened(kernel: Array, channels: int = 0) -> Array:
    """A first layer's kernel [..., n C, width], zero for the C channels that follow each C of x.

    Args:
      kernel: of a convolution, or of a dense layer of patches of n pixels.
      channels: C; 0 where n is 1.

    Raises:
      ValueError: C does not divide n C, or must be given.
    """
    rows, width = kernel.shape[-2:]
    if not channels and kernel.ndim == 2:
        raise ValueError(
            f"a transformer's patches of {rows} numbers do not tell how many channels x has: "
            "expected instruct(channels=4), say"
        )
    channels = channels or rows
    if rows % channels:
        raise ValueError(f"channels={channels} must divide the {rows} rows of the first layer")
    parts = kernel.astype(jnp.float32).reshape(*kernel.shape[:-2], -1, channels, width)
    both = jnp.concatenate([parts, jnp.zeros_like(parts)], axis=-2)
    return both.reshape(*kernel.shape[:-2], 2 * rows, width)


def first_layer(base: Params) -> str:
    """The path of the first layer's kernel, in a network with or without a text encoder.

    Raises:
      ValueError: there is none.
    """
    flat: dict[str, Any] = flatten_dict(base, sep="/")
    prefix = "image/" if "image" in base and "text" in base else ""
    found = [path for path in (prefix + name for name in FIRST) if path in flat]
    if not found:
        raise ValueError(f"instruct() is for a U-Net or a transformer; it has {', '.join(base)}")
    return found[0]


def instruct(what: str = "^(?!text/)", channels: int = 0) -> Instruct:
    """A network that edits pictures; see ``Instruct``. By default text encoders stay as they are.

    Raises:
      ValueError: an option cannot be.
    """
    if channels < 0:
        raise ValueError(f"channels={channels} must not be negative")
    return Instruct(full(what).what, channels)
