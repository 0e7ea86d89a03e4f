"""What metrics are given: real examples, and samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion.data import densities
from diffusion.data.sources import Source
from diffusion.errors import check_range


class Data(NamedTuple):
    """Real examples: those that the model was trained on, and others."""

    train: Source
    held_out: Source


class Drawn(NamedTuple):
    """Samples x [N, ...] as the data are, and the class, caption or prompt of each."""

    x: np.ndarray
    subjects: Sequence[Any]


Draw = Callable[[], Drawn]
Metric = Callable[[Any, Any, Data, Draw], dict[str, Any]]


def checked(drawn: Drawn, data: Data) -> np.ndarray:
    """The samples, if there are at least two, finite, of the data's shape, each with a subject."""
    x, shape = np.asarray(drawn.x, np.float32), data.held_out.shape
    if len(x) < 2 or x.shape[1:] != shape:
        raise ValueError(
            f"expected at least two samples [N, {', '.join(map(str, shape))}], got {x.shape}"
        )
    if len(drawn.subjects) != len(x):
        raise ValueError(
            f"expected a subject for each of the {len(x)} samples, got {len(drawn.subjects)}"
        )
    if not np.isfinite(x).all():
        bad = int((~np.isfinite(x)).reshape(len(x), -1).any(1).sum())
        raise ValueError(f"{bad} of {len(x)} samples contain NaN or infinity")
    return x


def of_points(name: str, distance: Callable[[np.ndarray, np.ndarray], float], seed: int) -> Metric:
    """``distance`` to fresh points of the density, beside real points against real ones.

    ``seed`` draws the fresh points, and must differ from that of the training data.
    """
    check_range("seed", seed, 0)

    def measure(pipeline: Any, params: Any, data: Data, draw: Draw) -> dict[str, Any]:
        x = checked(draw(), data)
        fresh = densities.sample(data.held_out.name, 2 * len(x), np.random.default_rng(seed))
        real, other = fresh[: len(x)], fresh[len(x) :]
        return {name: distance(x, real), f"{name}_real": distance(other, real)}

    return measure


def seen(pipeline: Any, params: Any, x: np.ndarray) -> np.ndarray:
    """Examples as the network sees them: encoded, unless they are so already."""
    if x.shape[1:] == pipeline.shape:
        return x
    return np.asarray(pipeline.codec.encode(params, x))


def shown(pipeline: Any, params: Any, x: np.ndarray) -> np.ndarray:
    """Examples as they can be shown: decoded, where they are what the network sees."""
    if pipeline.codec.factor == 1 or x.shape[1:] != pipeline.shape:
        return x
    return pipeline.codec.decode_all(params, x)
