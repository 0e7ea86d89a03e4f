"""What a metric is, and what it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion.data import densities
from diffusion.data.sources import Source
from diffusion.errors import check_range
from diffusion.evaluation.networks.network import PIXELS, Network
from diffusion.evaluation.sets import Set

ENDINGS = ("_ci", "_real")


class Data(NamedTuple):
    """Real examples: those that the model was trained on, others, and others to choose by."""

    train: Source
    held_out: Source
    validation: Source | None = None


@dataclass(frozen=True, eq=False)
class Samples:
    """What is judged.

    Attributes:
      count: number of samples.
      draw: (first, end) -> samples [end - first, ...] as the data are: float, or uint8 pictures.
        Sample i is the same however the samples are cut.
      subjects: class, caption or prompt of each sample; empty if not known.
      name: for reports.
      checksum: of a file that they come from; "" of samples that are drawn.
    """

    count: int
    draw: Callable[[int, int], np.ndarray]
    subjects: Sequence[Any] = ()
    name: str = "samples"
    checksum: str = ""


def of_array(x: np.ndarray, subjects: Sequence[Any] = ()) -> Samples:
    """Samples [N, ...] that are in memory."""
    return Samples(len(x), lambda first, end: x[first:end], subjects)


class Judged(NamedTuple):
    """What a metric is given.

    Attributes:
      samples: as the metric's network sees them; None for a metric that needs none.
      real: the name of real examples -> the same of them: "test" (held out), "train", the path of
        a reference; "" are those of the config.
      network: the metric's network, or None.
      pipeline, params: the model; None for samples from a file.
      data: gives the real examples of the config.
      folder: where pictures may be left, or None.
    """

    samples: Set
    real: Callable[[str], Set]
    network: Network | None = None
    pipeline: Any = None
    params: Any = None
    data: Callable[[], Data] | None = None
    folder: Path | None = None

    def name(self, figure: str) -> str:
        """A figure's name with that of the network: "fid_ci" -> "fid_inception2015_ci"."""
        base, end = figure, ""
        while ending := next((e for e in ENDINGS if base.endswith(e)), ""):
            base, end = base.removesuffix(ending), ending + end
        return f"{base}_{self.network.name}{end}"


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
      moments: whether means and covariances of the real examples suffice.
      pictures: whether it shows samples, so that they must be kept.
    """

    measure: Callable[[Judged], dict[str, Any]]
    outputs: tuple[str, ...] = ("features",)
    network: Network | None = None
    most: int = 0
    only: str = ""
    references: tuple[str, ...] = ()
    moments: bool = False
    pictures: bool = False


def of_points(name: str, distance: Callable[[np.ndarray, np.ndarray], float], seed: int) -> Metric:
    """``distance`` to fresh points of the density, beside real points against real ones.

    ``seed`` draws the fresh points, and must differ from that of the training data.
    """
    check_range("seed", seed, 0)

    def measure(judged: Judged) -> dict[str, Any]:
        x = judged.samples.array()
        density = judged.data().held_out.name
        fresh = densities.sample(density, 2 * len(x), np.random.default_rng(seed))
        real, other = fresh[: len(x)], fresh[len(x) :]
        return {name: distance(x, real), f"{name}_real": distance(other, real)}

    return Metric(measure, network=PIXELS)


def seen(pipeline: Any, params: Any, x: np.ndarray) -> np.ndarray:
    """Examples as the network sees them: encoded, unless they are so already."""
    if x.shape[1:] == pipeline.shape:
        return x
    return np.asarray(pipeline.codec.encode(params, x))


def shown(pipeline: Any, params: Any, x: np.ndarray) -> np.ndarray:
    """Examples as they can be shown: decoded, where they are what the network sees."""
    if pipeline is None or pipeline.codec.factor == 1 or x.shape[1:] != pipeline.shape:
        return x
    return pipeline.codec.decode_all(params, x)
