"""Prior preservation (DreamBooth; Ruiz et al., 2023, eq. 2): a subject is learned, its class kept.

    loss = mean over the subject's examples of w(t) d + weight * mean over the class's of d

where the class's pictures are mostly drawn by the model before it was trained. The objective's
weighting w acts on the subject's half alone, and so do terms before this one.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

from diffusion.errors import check_range
from diffusion.levels import Array
from diffusion.objectives.objective import Context, Measured, Weighted
from diffusion.objectives.terms.term import Noised


@dataclasses.dataclass(frozen=True)
class PriorPreservation:
    """The term, which acts in training alone, on batches of which every second example is of the
    class: batch["prior"] [B] is 1 for those, else 0.

    Attributes:
      weight: of the class's half, >= 0.
    """

    weight: float = 1.0
    name: ClassVar[str] = "prior_preservation"
    blocks: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        check_range("weight", self.weight, 0)

    def init(self, key: Array, noised: Noised) -> None:
        """The term has no parameters."""

    def __call__(self, loss: Array, params: None, context: Context, noised: Noised) -> Measured:
        """Twice the loss of each example of the subject, twice the weighted distance of each of the
        class: the mean over a batch is the sum of the halves' means, however it is cut into pieces.
        """
        if not context.train:
            return loss, {}
        prior, distance = noised.batch["prior"], noised.distance
        metrics = {
            "subject_loss": Weighted(((1 - prior) * loss).mean(), (1 - prior).mean()),
            "prior_loss": Weighted((prior * distance).mean(), prior.mean()),
        }
        return 2 * jnp.where(prior > 0, self.weight * distance, loss), metrics
