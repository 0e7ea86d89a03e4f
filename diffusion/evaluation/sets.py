"""Sets of examples as a feature network sees them: samples, real ones, a reference in a file."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from diffusion.data.sources import Source, affordable, subset
from diffusion.evaluation.moments import Moments, moments
from diffusion.evaluation.networks.network import Network

CHUNK = 1000
SHUFFLED = 10_000
BYTES = 2**29  # of real examples that are in memory at a time


@dataclass(frozen=True, eq=False)
class Set:
    """The outputs of one feature network for a set of examples.

    Attributes:
      name: of the examples, for reports.
      count: number of examples.
      chunks: output -> its arrays [b, ...], in order.
      subjects: class, caption or prompt of each example; empty if not known.
      about: what figures depend on besides the network, such as a checksum and the resolution.
      known: output -> its moments, where they are known without the features.
      shape: of one example; empty if not known.
      examples: indices -> examples [B, *shape] to show; None if they were not kept.
    """

    name: str
    count: int
    chunks: Callable[[str], Iterator[np.ndarray]]
    subjects: Sequence[Any] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, Moments] = field(default_factory=dict)
    shape: tuple[int, ...] = ()
    examples: Callable[[np.ndarray], np.ndarray] | None = None

    @cached_property
    def _moments(self) -> dict[str, Moments]:
        return dict(self.known)

    def moments(self, output: str = "features") -> Moments:
        """Mean and covariance of all examples, computed once."""
        if output not in self._moments:
            self._moments[output] = moments(self.chunks(output))
        return self._moments[output]

    def array(self, output: str = "features", most: int | None = None) -> np.ndarray:
        """An output [N, ...] of the first examples, ``most`` of them at most."""
        parts, count = [], 0
        for chunk in self.chunks(output):
            parts.append(chunk if most is None else chunk[: most - count])
            count += len(parts[-1])
            if count == most:
                break
        return np.concatenate(parts)

    def subset(self, index: np.ndarray) -> Set:
        """Of the examples ``index``, which ascend."""
        index = np.asarray(index)
        if not len(index) or index[0] < 0 or index[-1] >= self.count or (np.diff(index) <= 0).any():
            raise ValueError(f"expected ascending indices below {self.count}, got {index}")

        def chunks(output: str) -> Iterator[np.ndarray]:
            start = 0
            for chunk in self.chunks(output):
                own = index[(start <= index) & (index < start + len(chunk))] - start
                start += len(chunk)
                if len(own):
                    yield chunk[own]

        subjects = [self.subjects[i] for i in index] if self.subjects else ()
        examples = self.examples and (lambda i: self.examples(index[i]))
        about = self.about
        return Set(self.name, len(index), chunks, subjects, about, {}, self.shape, examples)


def of_arrays(
    name: str,
    arrays: Mapping[str, np.ndarray],
    subjects: Sequence[Any] = (),
    about: Mapping[str, Any] = MappingProxyType({}),
    shape: tuple[int, ...] = (),
) -> Set:
    """A set whose outputs are in memory."""

    def chunks(output: str) -> Iterator[np.ndarray]:
        x = arrays[output]
        return (x[i : i + CHUNK] for i in range(0, len(x), CHUNK))

    count = len(next(iter(arrays.values())))
    return Set(name, count, chunks, subjects, about, shape=shape)


def of_source(
    source: Source,
    net: Network,
    outputs: Sequence[str],
    show: Callable[[np.ndarray], np.ndarray],
    split: str,
) -> Set:
    """Real examples as a network sees them, whose outputs stay in memory.

    Of a set whose pixels would take more than 2 GiB, as many as fit, evenly spread. Many examples
    are shuffled, because they may lie class by class, and some metrics take the first 10,000.

    Args:
      source: the examples.
      net, outputs: the network, and its outputs that are needed.
      show: examples as the source has them -> as they are judged.
      split: for the name.
    """
    source, parts, labels = affordable(source), [], []
    if len(source) > SHUFFLED:
        source = subset(source, np.random.default_rng(0).permutation(len(source)))
    digest, shape = hashlib.sha256(), ()
    step = max(1, min(CHUNK, BYTES // (4 * math.prod(source.shape))))
    for first in range(0, len(source), step):
        index = np.arange(first, min(first + step, len(source)))
        batch = source.read(index)
        x = show(batch["x"])
        shape = x.shape[1:]
        digest.update(np.ascontiguousarray(batch["x"]).data)
        own = [source.captions[i] for i in index] if source.captions else [None] * len(index)
        own = batch["label"].tolist() if "label" in batch else own
        labels += own
        parts.append(net(x, own, outputs))
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in outputs}
    about = {"checksum": digest.hexdigest()[:16]}
    subjects = labels if labels[0] is not None else ()
    made = of_arrays(f"{source.name} {split}", arrays, subjects, about, shape)
    return replace(made, examples=lambda index: show(source.read(np.asarray(index))["x"]))
