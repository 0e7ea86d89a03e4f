"""The contract of what is put around a pipeline's network for some pictures.

ControlNets and T2I-Adapters (``control``) and IP-Adapters (``image_prompts``) are extensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.pipelines.pipeline import Params, Pipeline


class Extension(Protocol):
    """Something around a network, checked before any weight is read.

    Attributes:
      pictures: [H, W, C] in [-1, 1], by name: what is saved beside the results, such as the edges
        that a ControlNet follows.
    """

    pictures: Mapping[str, np.ndarray]

    def pipeline(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with this around its network."""

    def load(self, params: Params) -> Params:
        """The parameters of ``pipeline(...)``, of those of the pipeline that it is put around."""

    def condition(
        self, params: Params, keys: jax.Array, cond: Conditioning, null: Conditioning | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """Both with what this adds, for a batch of keys [B]; ``params`` as ``load`` gives them."""
