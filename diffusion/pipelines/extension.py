"""The contracts of what is attached to a model, and of what is put around it for some pictures.

LoRA (``adapters``) and textual inversion (``concepts``) are attached. ControlNets and T2I-Adapters
(``control``) and IP-Adapters (``image_prompts``) are extensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.pipelines.pipeline import Params, Pipeline


class Attachment(Protocol):
    """What changes a model's parameters, checked before any of them is read."""

    def pipeline(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this attached."""

    def load(self, params: Params) -> Params:
        """The parameters of ``pipeline(...)``, of those of the pipeline that it is attached to,
        which stay as they are."""


class Extension(Attachment, Protocol):
    """Something around a network, which conditions it further.

    Attributes:
      pictures: [H, W, C] in [-1, 1], by name: what is saved beside the results, such as the edges
        that a ControlNet follows.
    """

    pictures: Mapping[str, np.ndarray]

    def condition(
        self, params: Params, keys: jax.Array, cond: Conditioning, null: Conditioning | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """Both with what this adds, for a batch of keys [B]; ``params`` as ``load`` gives them."""
