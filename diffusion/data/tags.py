"""Captions that are lists of tags, "a cat, sitting, red", changed anew in every epoch."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from diffusion.errors import check_range


@dataclasses.dataclass(frozen=True)
class Tags:
    """How the tags of a caption, parted by commas, are changed.

    Attributes:
      shuffle: whether their order is random.
      keep: the first ones, which stay where they are.
      dropout: probability with which each of the others is left out, in [0, 1].
    """

    shuffle: bool = False
    keep: int = 0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        check_range("keep", self.keep, 0)
        check_range("dropout", self.dropout, 0, 1)
        if not (self.shuffle or self.dropout):
            raise ValueError(f"keep={self.keep} has no effect without shuffle or dropout")

    def __call__(self, caption: str, seed: Sequence[int]) -> str:
        """The caption as ``seed`` changes it."""
        tags = [tag.strip() for tag in caption.split(",")]
        kept, others = tags[: self.keep], tags[self.keep :]
        rng = np.random.default_rng(seed)
        order, draws = rng.permutation(len(others)), rng.random(len(others))
        if not self.shuffle:
            order = np.arange(len(others))
        return ", ".join(kept + [others[i] for i in order if draws[i] >= self.dropout])
