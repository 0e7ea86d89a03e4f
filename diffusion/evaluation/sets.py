"""Sets of examples as a feature network sees them: samples, real ones, a reference in a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np

from diffusion.evaluation.moments import Moments, moments

CHUNK = 1000


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
    """

    name: str
    count: int
    chunks: Callable[[str], Iterator[np.ndarray]]
    subjects: Sequence[Any] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    known: Mapping[str, Moments] = MappingProxyType({})

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
        """Of the examples ``index``, in order."""

        def chunks(output: str) -> Iterator[np.ndarray]:
            start = 0
            for chunk in self.chunks(output):
                own = index[(start <= index) & (index < start + len(chunk))] - start
                start += len(chunk)
                if len(own):
                    yield chunk[own]

        subjects = [self.subjects[i] for i in index] if self.subjects else ()
        return Set(self.name, len(index), chunks, subjects, self.about)


def of_arrays(name: str, arrays: Mapping[str, np.ndarray], subjects: Sequence[Any] = ()) -> Set:
    """A set whose outputs are in memory."""

    def chunks(output: str) -> Iterator[np.ndarray]:
        x = arrays[output]
        return (x[i : i + CHUNK] for i in range(0, len(x), CHUNK))

    return Set(name, len(next(iter(arrays.values()))), chunks, subjects)
