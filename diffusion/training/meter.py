"""What is measured of a run: means over intervals, speed, the progress bar."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import jax
from tqdm import tqdm

from diffusion.levels import Array
from diffusion.training.logging import Logger


class Meter:
    """Means over the log's intervals, speed, and the progress bar."""

    def __init__(
        self,
        logger: Logger,
        start: int,
        steps: int,
        log_every: int,
        batch_size: int,
        interval: Mapping[str, Any],
    ):
        self._logger, self._steps, self._log_every = logger, steps, log_every
        self._batch_size = batch_size
        # The part of an interval that lies before a checkpoint travels with it.
        self._sums = dict(interval.get("sums", {}))
        self._count = interval.get("count", 0)
        self._lapsed, self._timed, self._since = 0.0, 0, None
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            # Lines of text stand in for it; of several processes one tells.
            disable=not sys.stderr.isatty() or jax.process_index() > 0,
            ncols=shutil.get_terminal_size().columns,  # tqdm's own gives 0 where none is known
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def compiled(self, seconds: float) -> None:
        """Starts the clock: the first step's time is compilation."""
        self._logger.text(f"compiled and ran the first step in {seconds:.1f} s")
        self._since, self._timed = time.perf_counter(), 0

    def interval(self) -> dict[str, Any]:
        """What a checkpoint needs for the log to go on exactly."""
        return {"sums": self._sums, "count": self._count}

    @contextmanager
    def paused(self):
        """Time in here does not count as training."""
        self._lapsed += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def add(self, step: int, values: Mapping[str, Array]) -> None:
        """Takes one step's metrics; writes a line at an interval's end."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._count += 1
        self._timed += 1
        self._bar.update(1)
        if step % self._log_every and step != self._steps:
            return
        means = {name: total / self._count for name, total in self._sums.items()}
        if step % self._log_every == 0:  # else a longer run goes on with this interval
            self._sums, self._count = {}, 0
        if self._since is not None:
            now = time.perf_counter()
            seconds = max(self._lapsed + now - self._since, 1e-9)
            speed = self._timed / seconds
            means["images_per_second"] = speed * self._batch_size
            self._lapsed, self._timed, self._since = 0.0, 0, now
            self._show(step, means, (self._steps - step) / speed)
        self._logger.scalars(step, means)

    def _show(self, step: int, means: Mapping[str, float], left: float) -> None:
        figures = f"loss {means['loss']:.4f}, {means['images_per_second']:.0f} images/s"
        self._bar.set_postfix_str(figures)
        if self._bar.disable:
            left = tqdm.format_interval(left)
            self._logger.text(f"step {step}/{self._steps}: {figures}, {left} left")
