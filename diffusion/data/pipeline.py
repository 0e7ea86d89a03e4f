"""From a source to an endless stream of batches: the stream is a pure function of (seed, step).

Batch ``step`` holds the positions ``step * B .. (step + 1) * B - 1`` of an endless stream in
which epoch e is a permutation of all examples, drawn from (seed, e). A batch may straddle two
epochs: no example is dropped, and batches may be larger than the data. Since the position in
the data is the step, resuming needs no stored state, and processes take slices of the same
global batch, so the global batch does not depend on how many there are. Where a source gives
``x_std`` beside ``x``, the mean and deviation of latents, the batch holds a sample of them.

Whole batches are read at once: per-example iteration costs more than the training step of a
small model. Grain supplies the reading threads and the prefetching.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator

import grain
import numpy as np

from diffusion.data.sources import Batch, Source


def batch_function(
    source: Source,
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    flip: bool = False,
) -> Callable[[int], Batch]:
    """The function step -> this process's part of the global batch; see ``batches``."""
    if batch_size < 1 or batch_size % process_count:
        raise ValueError(
            f"batch_size must be a positive multiple of the {process_count} processes, "
            f"got {batch_size}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}")
    if len(source) == 0:
        raise ValueError(f"{source.name} is empty")
    if flip and len(source.shape) != 3:
        raise ValueError(f"flip needs images (H, W, C), {source.name} has shape {source.shape}")
    local = batch_size // process_count
    index = np.arange(process_index * local, (process_index + 1) * local)

    @functools.lru_cache(maxsize=2)  # a batch touches few epochs, mostly one
    def epoch(number: int) -> tuple[np.ndarray, np.ndarray]:
        """Order of the examples [N], and whether each one is flipped [N]."""
        rng = np.random.default_rng((seed, number))
        return rng.permutation(len(source)), rng.random(len(source)) < 0.5

    def batch_at(step: int) -> Batch:
        number, position = np.divmod(step * batch_size + index, len(source))
        parts = [
            [which[position[number == e]] for which in epoch(int(e))] for e in np.unique(number)
        ]
        order, flipped = (np.concatenate(part) for part in zip(*parts))
        batch = source.read(order)
        if "x_std" in batch:  # of the whole global batch: processes must not share noise
            rng = np.random.default_rng((seed, 1, step))
            noise = rng.standard_normal((batch_size, *source.shape), np.float32)[index]
            batch["x"] = batch["x"] + batch.pop("x_std") * noise
        if flip:
            batch["x"][flipped] = batch["x"][flipped][:, :, ::-1]
        return batch | {"index": index.astype(np.int32)}

    return batch_at


def batches(
    source: Source,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    *,
    process_index: int = 0,
    process_count: int = 1,
    flip: bool = False,
    num_threads: int = 2,
    prefetch: int = 8,
) -> Iterator[Batch]:
    """Endless shuffled batches, read ahead in the background.

    Args:
      source: where examples come from.
      batch_size: B, over all processes.
      seed: fixes the order and the flips; epochs differ from each other.
      start_step: the step to begin with; ``batches(..., start_step=k)`` continues a stream of
        which k batches were used, exactly.
      process_index: which of ``process_count`` equal slices of each global batch to give.
      process_count: number of processes that share a batch.
      flip: mirror each image left-right with probability 1/2, anew in every epoch.
      num_threads: reading threads.
      prefetch: batches kept ready.

    Yields:
      dicts with ``x`` [B / process_count, ...] float32, ``label`` [...] int32 where there are
      labels, and ``index`` [...] int32, the example's position within the global batch.

    Raises:
      ValueError: B not divisible by the processes, an empty source, flip without images.
    """
    if start_step < 0:
        raise ValueError(f"start_step must not be negative, got {start_step}")
    batch_at = batch_function(
        source,
        batch_size,
        seed,
        process_index=process_index,
        process_count=process_count,
        flip=flip,
    )
    steps = grain.MapDataset.range(start_step, sys.maxsize // batch_size)
    options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch)
    return iter(steps.map(batch_at).to_iter_dataset(options))
