"""From a source to an endless stream of batches: the stream is a pure function of (seed, step).

Batch ``step`` holds the positions ``step * B .. (step + 1) * B - 1`` of an endless stream in
which epoch e is a permutation of all examples, drawn from (seed, e). A batch may straddle two
epochs: no example is dropped, and batches may be larger than the data. Since the position in
the data is the step, resuming needs no stored state, and processes take slices of the same
global batch, so the global batch does not depend on how many there are. If a source gives
``x_std`` beside ``x``, the deviation and mean of latents, the batch holds samples of the latents.

A source in buckets has such a stream per bucket, and every batch comes from one of them; see
``buckets.Schedule``.

Whole batches are read at once: per-example iteration costs more than the training step of a
small model. Grain supplies the reading threads and processes, and the prefetching.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator

import grain
import ml_dtypes
import numpy as np
from absl import flags

from diffusion.data.buckets import Schedule
from diffusion.data.sources import Batch, Source

CROPS = ("center", "random")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of images, new ones in every epoch, and the type of the result."""

    flip: bool = False  # mirror each image left-right with probability 1/2
    crop: str = "center"  # where larger images are cropped: ``center`` or ``random``
    dtype: str = "float32"  # of ``x``; bfloat16 halves the transfer to the device


PLAIN = Augmentation()


class _Stream:
    """Batches of one source: positions of an endless stream of its epochs."""

    def __init__(self, source: Source, batch_size: int, seed: tuple[int, ...], random_crop: bool):
        self._fields = source, batch_size, seed, random_crop
        self.source, self._batch_size, self._seed, self._random_crop = self._fields
        # A batch touches few epochs, mostly one.
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)

    def __reduce__(self):  # another process gets only what reading needs
        bare = dataclasses.replace(self.source, captions=(), encode=None, buckets=(), pictures=None)
        return _Stream, (bare, *self._fields[1:])

    def _draw(self, number: int) -> tuple[np.ndarray, ...]:
        """Of an epoch: order of the examples [N], flips [N] bool, positions of crops [N, 2]."""
        rng, n = np.random.default_rng((*self._seed, number)), len(self.source)
        drawn = rng.permutation(n), rng.random(n) < 0.5
        return (*drawn, rng.random((n, 2), np.float32)) if self._random_crop else drawn

    def drawn(self, number: int, part: np.ndarray) -> list[np.ndarray]:
        """The draws of ``_draw`` for the rows ``part`` of batch ``number``."""
        which, place = np.divmod(number * self._batch_size + part, len(self.source))
        rows = [(place[which == e], self._epoch(int(e))) for e in np.unique(which)]
        pieces = zip(*([values[at] for values in epoch] for at, epoch in rows))
        return [np.concatenate(piece) for piece in pieces]

    def read(self, number: int, part: np.ndarray) -> tuple[Batch, np.ndarray]:
        """The rows ``part`` of batch ``number``, and whether each is flipped."""
        order, flipped, *at = self.drawn(number, part)
        return self.source.crop(order, at[0]) if at else self.source.read(order), flipped


@dataclasses.dataclass(frozen=True)
class Batches:
    """step -> this process's part of the global batch."""

    streams: tuple[_Stream, ...]
    schedule: Schedule | None
    batch_size: int
    seed: int
    part: np.ndarray  # rows of the global batch
    augmentation: Augmentation

    def examples(self, step: int) -> tuple[Source, np.ndarray]:
        """The source (or bucket) of a step's batch, and the indices of its examples there."""
        stream, number = self._stream(step)
        return stream.source, stream.drawn(number, self.part)[0]

    def _stream(self, step: int) -> tuple[_Stream, int]:
        bucket, number = self.schedule(step) if self.schedule else (0, step)
        return self.streams[bucket], number

    def __call__(self, step: int) -> Batch:
        stream, number = self._stream(step)
        batch, flipped = stream.read(number, self.part)
        if "x_std" in batch:  # of the whole global batch: processes must not share noise
            rng = np.random.default_rng((self.seed, 1, step))
            shape = (self.batch_size, *stream.source.shape)
            noise = rng.standard_normal(shape, np.float32)[self.part]
            batch["x"] = batch["x"] + batch.pop("x_std") * noise
        if self.augmentation.flip:
            batch["x"][flipped] = batch["x"][flipped][:, :, ::-1]
        batch["x"] = batch["x"].astype(DTYPES[self.augmentation.dtype], copy=False)
        return batch | {"index": self.part.astype(np.int32)}


def batch_function(
    source: Source,
    batch_size: int,
    seed: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    augmentation: Augmentation = PLAIN,
) -> Batches:
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
    check(augmentation, source)
    local = batch_size // process_count
    part = np.arange(process_index * local, (process_index + 1) * local)
    random_crop, schedule = augmentation.crop == "random", None
    streams = [_Stream(source, batch_size, (seed,), random_crop)]
    if source.buckets:
        schedule = Schedule(tuple(map(len, source.buckets)), batch_size, seed)
        seeds = [(seed, 2, b) for b in range(len(source.buckets))]
        streams = [
            _Stream(bucket, batch_size, s, random_crop) for bucket, s in zip(source.buckets, seeds)
        ]
    return Batches(tuple(streams), schedule, batch_size, seed, part, augmentation)


def check(augmentation: Augmentation, source: Source) -> None:
    """Raises ValueError if a source does not allow the augmentation."""
    if augmentation.flip and len(source.shape) != 3:
        raise ValueError(f"flip needs images (H, W, C), {source.name} has shape {source.shape}")
    for name, valid in (("crop", CROPS), ("dtype", tuple(DTYPES))):
        value = getattr(augmentation, name)
        if value not in valid:
            raise ValueError(f"{name}={value!r}; choose {' or '.join(valid)}")
    if augmentation.crop == "random" and source.crop is None:
        raise ValueError(f"crop='random': {source.name} has images of one size, nothing to crop")


def batches(
    source: Source,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    *,
    process_index: int = 0,
    process_count: int = 1,
    augmentation: Augmentation = PLAIN,
    num_threads: int = 2,
    prefetch: int = 8,
    workers: int = 0,
) -> Iterator[Batch]:
    """Endless shuffled batches, read ahead in the background.

    Args:
      source: where examples come from.
      batch_size: B, over all processes.
      seed: fixes the order and the augmentation; epochs differ from each other.
      start_step: the first step; ``batches(..., start_step=k)`` continues exactly where a stream
        stands after k batches.
      process_index: which of ``process_count`` equal slices of each global batch this is.
      num_threads: reader threads in each reading process; 0 means one per core, at most 16. Batches
        do not depend on it.
      prefetch: batches that each reading process keeps ready.
      workers: reading processes; 0 means that this process reads. Each worker gets a copy of the
        source, so workers suit files rather than arrays in memory. Batches do not depend on it.

    Yields:
      dicts with ``x`` [B / process_count, ...], ``label`` [...] int32 where there are labels, and
      ``index`` [...] int32, the example's position within the global batch. All processes see the
      same shapes in the same step.
    """
    for name, value in {"start_step": start_step, "workers": workers}.items():
        if value < 0:
            raise ValueError(f"{name} must not be negative, got {value}")
    shared = dict(process_index=process_index, process_count=process_count)
    batch_at = batch_function(source, batch_size, seed, **shared, augmentation=augmentation)
    steps = grain.MapDataset.range(start_step, sys.maxsize // batch_size)
    threads = num_threads or min(16, os.cpu_count() or 1)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)
    dataset = steps.map(batch_at).to_iter_dataset(options)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain reads its flags in any program
            flags.FLAGS.mark_as_parsed()
        dataset = dataset.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
    return iter(dataset)
