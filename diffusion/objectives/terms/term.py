"""The contract of terms: what decorates the denoising loss.

Terms act one after another, each on the loss that the one before it left. A new one needs its file,
its name in ``config/terms.py`` and a test.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from diffusion.levels import Array, NoiseLevel
from diffusion.objectives.objective import Batch, Context, Measured, Params


class Noised(NamedTuple):
    """A batch, how it was noised, and what the network made of it.

    Attributes:
      x_t: [B, ...] the noised examples.
      level: leaves [B].
      x0_hat: [B, ...] the estimate of the examples.
      variance: [B, ...] the second half of the channels, in [-1, 1], of a network that gives twice
        as many as the examples have; else None.
      tokens: [B, h, w, C] of each block in a term's ``blocks``; empty outside training.
      distance: [B] between output and target, unweighted; None when terms are initialised.
    """

    batch: Batch
    x_t: Array
    level: NoiseLevel
    x0_hat: Array
    variance: Array | None
    tokens: dict[int, Array]
    distance: Array | None = None


class Term(Protocol):
    """A decoration of the loss.

    Attributes:
      name: of its parameters in ``params`` and ``frozen``, and of its metric.
      blocks: the network's blocks whose tokens it needs, as ``features`` counts them.
    """

    name: str
    blocks: tuple[int, ...]

    def init(self, key: Array, noised: Noised) -> Params | None:
        """Its initial parameters, or None if it has none; ``noised`` holds shapes alone."""

    def __call__(
        self, loss: Array, params: Params | None, context: Context, noised: Noised
    ) -> Measured:
        """The loss of each example [B] as this term changes it, and metrics."""
