"""Aspect-ratio buckets: batches of one shape each from images of many shapes (NovelAI, 2022).

A network that draws pictures of several shapes is best trained on whole pictures: square crops cut
heads off. All buckets have about the same area, and each picture goes to the one whose aspect ratio
is nearest.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np

Shape = tuple[int, int]  # height, width


def aspect(size: int, step: int = 64, max_aspect: float = 2.0) -> tuple[Shape, ...]:
    """Shapes (H, W) whose sides are multiples of ``step``, wide ones last.

    For every height this is the widest shape with H W <= size^2 whose sides have a ratio of at most
    ``max_aspect``; and the same with height and width exchanged. (size, size) is one of them.
    ``step`` is the autoencoder's factor times the network's, and divides ``size``.
    """
    if step < 1 or size < step or size % step:
        near = max(1, round(size / max(step, 1))) * max(step, 1)
        raise ValueError(f"step={step} must divide the size {size}; the nearest size is {near}")
    if not max_aspect >= 1:
        raise ValueError(f"max_aspect must be at least 1, got {max_aspect}")
    shapes = set()
    for short in range(step, size + 1, step):
        long = size**2 // short // step * step
        if long <= max_aspect * short:
            shapes |= {(short, long), (long, short)}
    # Of shapes of the same long side only the largest: the others are cut from it.
    widest = {(h, w) for h, w in shapes if sum(h <= a and w <= b for a, b in shapes) == 1}
    return tuple(sorted(widest, key=lambda shape: shape[1] / shape[0]))


def nearest(sizes: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """The index of the shape whose aspect ratio is nearest to that of each of ``sizes`` [N, 2]."""
    ratios = np.log([width / height for height, width in shapes])
    own = np.log(sizes[:, 1] / sizes[:, 0])
    return np.abs(own[:, None] - ratios).argmin(1)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Which bucket each step takes its batch from: a pure function of (seed, step).

    Epoch e takes floor(n_b (e + 1) / B) - floor(n_b e / B) batches from bucket b, in an order
    shuffled by (seed, e). After e epochs each bucket has given its e n_b examples, except fewer
    than B, with which its next epoch begins. In the long run every example is seen equally often,
    however small its bucket.

    Attributes:
      sizes: examples of each bucket.
      batch_size: B.
      seed: of the order.
    """

    sizes: tuple[int, ...]
    batch_size: int
    seed: int

    def __post_init__(self):
        if not self.sizes or min(self.sizes) < 1:
            raise ValueError(f"every bucket must hold an example, got {self.sizes}")

    def __call__(self, step: int) -> tuple[int, int]:
        """The bucket of a step, and the number of this batch among those of its bucket."""
        epoch = step * self.batch_size // sum(self.sizes)  # or later, as rests are left
        while self._before(epoch + 1) <= step:
            epoch += 1
        place = step - self._before(epoch)
        order = _order(self, epoch)
        bucket = int(order[place])
        earlier = self.sizes[bucket] * epoch // self.batch_size
        return bucket, earlier + int(np.count_nonzero(order[:place] == bucket))

    def _before(self, epoch: int) -> int:
        """The number of batches in all epochs before this one."""
        return sum(size * epoch // self.batch_size for size in self.sizes)


@functools.lru_cache(maxsize=8)
def _order(schedule: Schedule, epoch: int) -> np.ndarray:
    batch = schedule.batch_size
    counts = [n * (epoch + 1) // batch - n * epoch // batch for n in schedule.sizes]
    rng = np.random.default_rng((schedule.seed, 3, epoch))
    return rng.permutation(np.repeat(np.arange(len(counts)), counts))


CHOICES = {"aspect": aspect}
