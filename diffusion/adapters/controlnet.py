"""Training of a ControlNet beside a frozen U-Net."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.adapters.adapter import Params
from diffusion.levels import Array
from diffusion.models.controlled import Controlled
from diffusion.models.controlnet import HintNetwork, controlnet_of
from diffusion.models.surroundings import image_network, surrounded
from diffusion.models.unet import UNet

COPIED = r"conv_in|time_embedding|class_embedding|add_embedding|down_blocks_\d+|mid_block"
"""The parts of a U-Net that a ControlNet copies."""


@dataclass(frozen=True)
class TrainedControlNet:
    """A ControlNet that begins with the U-Net's own encoder.

    Attributes:
      hint_widths: see ``ControlNet``.
    """

    hint_widths: tuple[int, ...] = (16, 32, 96, 256)

    def network(self, network: nn.Module) -> nn.Module:
        """The U-Net with the ControlNet around it.

        Raises:
          ValueError: the network is no U-Net.
        """
        unet = image_network(network)
        if not isinstance(unet, UNet):
            raise ValueError(f"a ControlNet is for a U-Net; this is a {type(unet).__name__}")
        net = controlnet_of(unet, self.hint_widths)
        return surrounded(network, lambda image: Controlled(network=image, nets=(net,)))

    def init(self, key: Array, base: Params) -> Params:
        """The U-Net's own encoder, a random hint network, and convolutions that are zero."""
        unet = _image(base)
        copied = {name: unet[name] for name in unet if re.fullmatch(COPIED, name)}
        side = 2 ** (len(self.hint_widths) - 1)
        widths = skip_widths(unet)
        hint = HintNetwork(widths[0], self.hint_widths)
        params = {
            "controlnet_cond_embedding": hint.init(key, jnp.zeros((1, side, side, 3)))["params"]
        }
        names = [f"controlnet_down_blocks_{i}" for i in range(len(widths))]
        for name, width in zip([*names, "controlnet_mid_block"], [*widths, widths[-1]]):
            params[name] = {"kernel": jnp.zeros((1, 1, width, width)), "bias": jnp.zeros(width)}
        return jax.tree.map(lambda a: a.astype(jnp.float32), {**copied, **params})

    def merge(self, base: Params, params: Params) -> Params:
        """Both beside each other."""
        if "image" in base:
            return {**base, "image": self.merge(base["image"], params)}
        return {"network": base, "nets_0": params}


def controlnet(hint_widths: Sequence[int] = (16, 32, 96, 256)) -> TrainedControlNet:
    """A ControlNet; ``hint_widths`` has one entry more than pixels are halved to what the U-Net
    sees: 4 for Stable Diffusion's latents, 1 for pixels.

    Raises:
      ValueError: a width is not positive.
    """
    if not hint_widths or min(hint_widths) < 1:
        raise ValueError(f"hint_widths={hint_widths}: expected positive widths, as in (16, 32)")
    return TrainedControlNet(tuple(hint_widths))


def skip_widths(unet: Params) -> list[int]:
    """Channels of each of a U-Net's skip connections, finest first, of its parameters."""
    widths = [unet["conv_in"]["kernel"].shape[-1]]
    for level in range(sum(name.startswith("down_blocks_") for name in unet)):
        block = unet[f"down_blocks_{level}"]
        resnets = sum(name.startswith("resnets_") for name in block)
        width = block["resnets_0"]["conv2"]["kernel"].shape[-1]
        widths += [width] * (resnets + ("downsamplers_0" in block))
    return widths


def _image(base: Params) -> dict[str, Any]:
    return base.get("image", base)
