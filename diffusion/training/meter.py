"""What is measured of a run: means over intervals, speed, memory, the progress bar."""

from __future__ import annotations

import resource
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from diffusion.levels import Array
from diffusion.objectives.objective import Weighted
from diffusion.runs.logging import Logger


class Meter:
    """Means over the log's intervals, speed, and the progress bar.

    Args:
      logger: takes the lines.
      start, steps: done before, and in all.
      log_every: steps per line.
      batch_size: examples per step, over all devices and processes.
      interval: what ``interval()`` gave when the checkpoint was saved, or {}.
      flops: of a training step per example, or None.
      peak: FLOP/s of all devices together at most, or None.
      devices: whose memory is reported.
    """

    def __init__(
        self,
        logger: Logger,
        start: int,
        steps: int,
        log_every: int,
        batch_size: int,
        interval: Mapping[str, Any],
        *,
        flops: float | None = None,
        peak: float | None = None,
        devices: Sequence[jax.Device] = (),
    ):
        self._logger, self._steps, self._log_every = logger, steps, log_every
        self._batch_size, self._flops, self._peak, self._devices = batch_size, flops, peak, devices
        # The part of an interval that lies before a checkpoint travels with it.
        self._sums = dict(interval.get("sums", {}))
        self._count = interval.get("count", 0)
        self.latest: dict[str, float] = dict(interval.get("latest", {}))  # what was logged last
        self._skipped = interval.get("skipped", 0)
        self.skipped_in_a_row = interval.get("row", 0)
        self._lapsed, self._timed, self._since, self._waited = 0.0, 0, None, 0.0
        self._bar = tqdm(
            total=steps,
            initial=start,
            unit="step",
            # Lines of text stand in for it; of several processes only the first shows it.
            disable=not sys.stderr.isatty() or jax.process_index() > 0,
            ncols=shutil.get_terminal_size().columns,  # tqdm's own gives 0 where none is known
        )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._bar.close()

    def compiled(self, seconds: float) -> None:
        """Starts the clock: the first step's time is compilation."""
        work = f"; a step takes {self._flops / 1e9:.3g} GFLOP per image" if self._flops else ""
        self._logger.text(f"compiled and ran the first step in {seconds:.1f} s{work}")
        self._since, self._timed, self._waited = time.perf_counter(), 0, 0.0

    def judged(self, step: int, values: Mapping[str, float]) -> None:
        """Logs numbers as they are, as those of held-out data."""
        self.latest |= values
        self._logger.scalars(step, values)

    def interval(self) -> dict[str, Any]:
        """What a checkpoint needs for the log to go on exactly."""
        return {
            "sums": self._sums,
            "count": self._count,
            "skipped": self._skipped,
            "row": self.skipped_in_a_row,
            "latest": self.latest,
        }

    @contextmanager
    def paused(self):
        """Time in here does not count as training."""
        self._lapsed += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()

    def waited(self, seconds: float) -> None:
        """Adds a time for which the loop had no next batch."""
        self._waited += seconds

    def add(self, step: int, values: Mapping[str, Array | Weighted]) -> None:
        """Takes one step's metrics; writes a line at an interval's end."""
        for name, value in values.items():
            if isinstance(value, Weighted):
                self._add_weighted(name, np.asarray(value))  # [2] or [2, K]
            else:
                self._sums[name] = self._sums.get(name, 0.0) + float(value)
        self._count += 1
        self.skipped_in_a_row = 0
        self._done(step)

    def _add_weighted(self, name: str, halves: np.ndarray) -> None:
        names = [f"{name}{k + 1}" for k in range(halves[0].size)] if halves.ndim > 1 else [name]
        for name, total, weight in zip(names, *halves.reshape(2, -1).tolist()):
            old = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = [old[0] + total, old[1] + weight]

    def skip(self, step: int) -> int:
        """Counts a step that changed nothing, whose metrics are no numbers; how many in a row."""
        self._skipped += 1
        self.skipped_in_a_row += 1
        self._done(step)
        return self.skipped_in_a_row

    def _done(self, step: int) -> None:
        self._timed += 1
        self._bar.update(1)
        if step % self._log_every and step != self._steps:
            return
        means = {name: self._mean(total) for name, total in self._sums.items()}
        means = {name: mean for name, mean in means.items() if mean is not None}
        if self._skipped:
            means["skipped_steps"] = self._skipped
        if step % self._log_every == 0:  # else a longer run goes on with this interval
            self._sums, self._count, self._skipped = {}, 0, 0
        if self._since is not None:
            now = time.perf_counter()
            seconds = max(self._lapsed + now - self._since, 1e-9)
            speed = self._timed / seconds
            means |= self._machine(speed, min(self._waited / seconds, 1.0))
            self._lapsed, self._timed, self._since, self._waited = 0.0, 0, now, 0.0
            self._show(step, means, (self._steps - step) / speed)
        self.judged(step, means)

    def _mean(self, total: float | list[float]) -> float | None:
        """None of examples that there were none of."""
        if isinstance(total, list):
            return total[0] / total[1] if total[1] else None
        return total / self._count

    def _machine(self, speed: float, waited: float) -> dict[str, float]:
        images = speed * self._batch_size
        found = {"images_per_second": images, "step_seconds": 1 / speed, "waiting_for_data": waited}
        if self._flops:
            found["teraflops_per_second"] = images * self._flops / 1e12
            if self._peak:
                found["share_of_peak"] = images * self._flops / self._peak
        return found | memory(self._devices)

    def _show(self, step: int, means: Mapping[str, float], left: float) -> None:
        figures = f"loss {means.get('loss', float('nan')):.4f}, "
        figures += f"{means['images_per_second']:.0f} images/s"
        if "share_of_peak" in means:
            figures += f" ({means['share_of_peak']:.0%} of the peak)"
        if means["waiting_for_data"] > 0.1:
            figures += f", {means['waiting_for_data']:.0%} waiting for data"
        self._bar.set_postfix_str(figures)
        if self._bar.disable:
            left = tqdm.format_interval(left)
            self._logger.text(f"step {step}/{self._steps}: {figures}, {left} left")


def memory(devices: Sequence[jax.Device]) -> dict[str, float]:
    """GiB in use at most until now: "device_memory_gib", of the fullest of the devices, or
    "process_memory_gib" where devices do not report it, as CPUs."""
    stats = [device.memory_stats() or {} for device in devices]
    if stats and all("peak_bytes_in_use" in s for s in stats):
        return {"device_memory_gib": max(s["peak_bytes_in_use"] for s in stats) / 2**30}
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"process_memory_gib": most * (1 if sys.platform == "darwin" else 1024) / 2**30}
