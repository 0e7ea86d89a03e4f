"""Progress of a running sampler: a bar by evaluations, and previews of x_0."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from tqdm import tqdm

Preview = Callable[[int, int, np.ndarray], None]  # (batch, evaluation from 1, x_0_hat [B, ...])


class Monitor:
    """A callback for ``make_sampler``, to be used within ``watch``.

    A sampler with a callback compiles in every process, since JAX does not keep such programs in
    its cache: it is for long runs.

    Args:
      devices: number of devices that the sampler uses; each reports its share of the batch.
      preview: called with the batch's number, the evaluation's (from 1) and x_0_hat of the batch.
      every: evaluations between previews; 0 for none.
    """

    def __init__(self, devices: int, preview: Preview | None = None, every: int = 0):
        if every < 0:
            raise ValueError(f"every must be >= 0, got {every}")
        self._devices, self._preview, self._every = devices, preview, every
        self._bar = tqdm(disable=True)
        self._evaluations = 1
        self._reports = 0
        self._shares: dict[tuple[int, int], dict[int, np.ndarray]] = defaultdict(dict)

    @contextmanager
    def watch(self, batches: int, evaluations: int, bar: bool = True) -> Iterator[None]:
        """Follows a run of ``batches`` with ``evaluations`` each."""
        self._reports, self._evaluations = 0, evaluations
        self._shares.clear()
        total = batches * evaluations
        with tqdm(total=total, unit="evaluation", desc="sampling", disable=not bar) as self._bar:
            yield

    def __call__(self, evaluation: np.ndarray, x0: np.ndarray, share: np.ndarray) -> None:
        """Reports x_0_hat of one device's share of the batch, after an evaluation from 0 on."""
        batch, r = self._reports // (self._evaluations * self._devices), int(evaluation) + 1
        self._reports += 1
        if self._reports % self._devices == 0:
            self._bar.update()
        if self._preview is None or not self._every or r % self._every:
            return
        shares = self._shares[batch, r]
        shares[int(share)] = np.array(x0)
        if len(shares) == self._devices:
            whole = np.concatenate([shares[i] for i in range(self._devices)])
            del self._shares[batch, r]
            self._preview(batch, r, whole)
