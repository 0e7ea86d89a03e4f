"""A pretrained pipeline: networks, tokenizers and scheduler configs; apart from them, weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import flax.linen as nn

from diffusion.models.autoencoder import AutoencoderKL
from diffusion.sampling.acceleration import NONE, Acceleration

Params = Mapping[str, Any]
"""Parameters by component: network, autoencoder, and encoders, a list like the pipeline's."""


@dataclass(frozen=True)
class Pipeline:
    """What belongs together to make pictures.

    Attributes:
      kind: diffusers' name of it: "StableDiffusionPipeline", ...
      network: the U-Net or DiT, which knows ``in_channels`` (latents and what is concatenated
        to them) and ``image_size`` (of the latents that it was trained on).
      autoencoder: between images and latents.
      scheduler: the fields of its ``scheduler_config.json``.
      encoders: of text, in the order of the published pipelines.
      tokenizers: one for each.
      low_res_scheduler: config of what noises an upscaler's small picture.
      tile: pixels of the autoencoder's tiles, for large pictures; 0: they are not cut.
      acceleration: what makes the network's evaluations cheaper.
      options: other fields of ``model_index.json``, such as force_zeros_for_empty_prompt.
    """

    kind: str
    network: nn.Module
    autoencoder: AutoencoderKL
    scheduler: Mapping[str, Any]
    encoders: tuple[nn.Module, ...] = ()
    tokenizers: tuple[Any, ...] = ()
    low_res_scheduler: Mapping[str, Any] | None = None
    tile: int = 0
    acceleration: Acceleration = NONE
    options: Mapping[str, Any] = field(default_factory=dict)

    def latent_shape(self, size: tuple[int, int] | None = None) -> tuple[int, int, int]:
        """(h, w, C) of the latents of a picture of ``size`` (height, width) pixels.

        Raises:
          ValueError: the networks cannot make that size.
        """
        channels, factor = self.autoencoder.latent_channels, self.autoencoder.factor
        if size is None:
            trained = self.network.image_size
            if trained is None:
                raise ValueError("the network does not say what size it was trained on: give one")
            return (*(trained if isinstance(trained, tuple) else (trained, trained)), channels)
        levels = len(getattr(self.network, "widths", (0,)))
        unit = factor * getattr(self.network, "patch", 2 ** (levels - 1))
        for side in size:
            if side < unit or side % unit:
                nearest = max(round(side / unit), 1) * unit
                raise ValueError(
                    f"a picture of {size[0]} x {size[1]}: sides must be multiples of {unit} "
                    f"pixels; nearest to {side}: {nearest}"
                )
        return (size[0] // factor, size[1] // factor, channels)
