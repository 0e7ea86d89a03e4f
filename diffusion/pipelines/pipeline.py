"""A pipeline: all that belongs to a generative model, apart from its parameters.

A trained run, a diffusers folder, a hub id and a single file all become one (``from_run``,
``from_pretrained``, ``from_single_file``), so that whatever draws, edits or judges works on each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import flax.linen as nn

from diffusion.conditioning import Conditioning
from diffusion.denoiser import ConditionalDenoise, denoiser
from diffusion.evaluation.views import VIEWS, View
from diffusion.levels import Array, NoiseLevel
from diffusion.models.surroundings import columns, image_network
from diffusion.pipelines.codec import Codec
from diffusion.pipelines.conditioners import Conditioner
from diffusion.pipelines.few_step_families import FewSteps
from diffusion.predictions import Prediction
from diffusion.schedules import Schedule

Params = Mapping[str, Any]
"""Parameters by component: "network", and where there are such parts "autoencoder" and "encoders",
a list like the conditioner's."""


class Defaults(NamedTuple):
    """How a pipeline is sampled by default.

    Attributes:
      solver, grid: specs; an empty solver is the class of the pipeline's scheduler, and the grid
        "auto" is ``grids.usual`` for its schedule.
      steps: of the solver.
      guidance: specs of the links of the chain.
    """

    solver: str = "dpmpp_2m"
    grid: str = "auto"
    steps: int = 20
    guidance: tuple[str, ...] = ("clip()",)


DEFAULTS = Defaults()


@dataclass(frozen=True, eq=False)
class Pipeline:
    """What belongs together to make samples.

    Attributes:
      kind: diffusers' name of the pipeline ("StableDiffusionPipeline", ...), or "run".
      network: linen module (x, c_noise, cond) -> F.
      schedule, prediction, c_noise: what its output means.
      shape: of one example as the network sees it, at the size that it was trained on.
      codec: between examples and what the network sees of them.
      conditioner: labels or texts -> conditioning, with what stands for none.
      view: how examples are shown and saved.
      defaults: solver, grid, steps and guidance.
      few_steps: what a few-step checkpoint can do; None for other models.
      scheduler: the fields of diffusers' ``scheduler_config.json``; None for a run.
      low_res_scheduler: config of what noises an upscaler's small picture.
      edits: whether it edits a picture as a text says (InstructPix2Pix).
      options: other fields of ``model_index.json``, such as requires_aesthetics_score.
    """

    kind: str
    network: nn.Module
    schedule: Schedule
    prediction: Prediction
    c_noise: Callable[[NoiseLevel], Array]
    shape: tuple[int, ...]
    codec: Codec = field(default_factory=Codec)
    conditioner: Conditioner = field(default_factory=Conditioner)
    view: View = VIEWS["images"]
    defaults: Defaults = DEFAULTS
    few_steps: FewSteps | None = None
    scheduler: Mapping[str, Any] | None = None
    low_res_scheduler: Mapping[str, Any] | None = None
    edits: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def denoiser(self, params: Params) -> ConditionalDenoise:
        """E[x_0 | x_t, cond] as the network with these parameters estimates it."""

        def network(x: Array, c_noise: Array, cond: Conditioning) -> Array:
            return self.network.apply({"params": params["network"]}, x, c_noise, cond)

        return denoiser(network, self.prediction, self.c_noise)

    @property
    def image_network(self) -> nn.Module:
        """The network without the text encoder that was trained with it, and without adapters."""
        return image_network(self.network)

    @property
    def columns(self) -> tuple[str, ...]:
        """What samples are given besides a label or text, by the names that batches have."""
        return (*(["image"] if self.edits else []), *columns(self.network))

    @property
    def takes_scale(self) -> bool:
        """Whether guidance's scale is an input of the network, as of latent consistency models."""
        return getattr(self.image_network, "guidance_width", None) is not None

    @property
    def extra_channels(self) -> int:
        """Channels that the network takes beside x, as ``cond.image``."""
        taken = getattr(self.image_network, "in_channels", None)
        return taken - self.shape[-1] if taken else 0

    @property
    def channels(self) -> int:
        """Channels of an example, before the codec."""
        return getattr(self.codec, "channels", self.shape[-1])

    @property
    def unit(self) -> int:
        """Pixels that the sides of a picture must be a multiple of."""
        net, unit = self.image_network, 1
        if getattr(net, "halves_exactly", False):
            unit = 2 ** (len(net.widths) - 1)
        return self.codec.factor * getattr(net, "patch", unit)

    @property
    def size(self) -> tuple[int, ...]:
        """(height, width) in pixels of the pictures that the network was trained on."""
        return tuple(self.codec.factor * side for side in self.shape[:-1])

    def shape_of(self, size: tuple[int, int] | None = None) -> tuple[int, ...]:
        """The network's shape (h, w, C) of a picture of ``size`` (height, width) in pixels.

        Raises:
          ValueError: the networks cannot make that size.
        """
        if size is None:
            return self.shape
        for side in size:
            if side < self.unit or side % self.unit:
                nearest = max(round(side / self.unit), 1) * self.unit
                raise ValueError(
                    f"a picture of {size[0]} x {size[1]}: sides must be multiples of {self.unit} "
                    f"pixels; nearest to {side}: {nearest}"
                )
        return (*(side // self.codec.factor for side in size), self.shape[-1])
