"""What a metric is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion.data.sources import Source
from diffusion.evaluation.networks.network import Network
from diffusion.evaluation.sets import Set


class Data(NamedTuple):
    """Real examples: those that the model was trained on, and others."""

    train: Source
    held_out: Source


class Drawn(NamedTuple):
    """Samples x [N, ...] as the data are, and the class, caption or prompt of each."""

    x: np.ndarray
    subjects: Sequence[Any]


class Judged(NamedTuple):
    """What a metric is given.

    Attributes:
      samples: as the metric's network sees them; None for a metric that needs none.
      real: the name of real examples -> the same of them: "test" (held out), "train", the path of
        a reference; "" are those of the config.
      network: the metric's network, or None.
      pipeline, params, data: the model and its real examples; None for samples from a file.
      folder: where pictures may be left, or None.
    """

    samples: Set
    real: Callable[[str], Set]
    network: Network | None = None
    pipeline: Any = None
    params: Any = None
    data: Data | None = None
    folder: Path | None = None

    def name(self, figure: str) -> str:
        """A figure's name with that of the network: "fid" -> "fid_inception2015"."""
        return f"{figure}_{self.network.name}"


@dataclass(frozen=True, eq=False)
class Metric:
    """A metric, which takes figures from the features of one network.

    Attributes:
      measure: gives the figures, {name: what JSON can hold}. A figure of real data that stands
        beside another has its name with "_real", half the width of a 95 % interval "_ci".
      outputs: of the network, that it needs of the samples; empty if it needs no samples.
      network: None is the one that the config names.
      most: examples that it needs of the samples, 0 being all.
      only: the name of the network that the metric is defined for; "" is any.
      references: names of the real examples that it needs, which are looked for first.
    """

    measure: Callable[[Judged], dict[str, Any]]
    outputs: tuple[str, ...] = ("features",)
    network: Network | None = None
    most: int = 0
    only: str = ""
    references: tuple[str, ...] = ()
