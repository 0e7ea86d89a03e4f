"""From a source to an endless stream of batches: the stream is a pure function of (seed, step).

Batch ``step`` holds the positions ``step * B .. (step + 1) * B - 1`` of an endless stream in
which epoch e is a permutation of all examples, drawn from (seed, e). A batch may straddle two
epochs: no example is dropped, and batches may be larger than the data. Since the position in
the data is the step, resuming needs no stored state, and processes take slices of the same
global batch, so the global batch does not depend on how many there are. If a source gives
``x_std`` beside ``x``, the deviation and mean of latents, the batch holds samples of the latents.

A source in buckets has such a stream per bucket, and every batch comes from one of them; see
``buckets.Schedule``. A source with shares has one per share, and every batch takes from all of
them in turn.

Whole batches are read at once: per-example iteration costs more than the training step of a
small model. Grain supplies the reading threads and processes, and the prefetching.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

import grain
import ml_dtypes
import numpy as np
from absl import flags

from diffusion.data.buckets import Schedule
from diffusion.data.sources import Batch, Source, subset

CROPS = ("center", "random")
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}
PICTURES = ("x", "image")  # what is mirrored
# What a seed is for, after the run's; 3 orders buckets
NOISE, BUCKETS, SHARES, CAPTIONS = 1, 2, 4, 5
Rewrite = Callable[[str, Sequence[int]], str]
"""(caption, seed) -> the caption as training sees it this time."""


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Random changes of examples, new ones in every epoch, and the type of the result."""

    flip: bool = False  # mirror each image left-right with probability 1/2
    crop: str = "center"  # where larger images are cropped: ``center`` or ``random``
    captions: Rewrite | None = None  # changes of captions, before they are encoded
    dtype: str = "float32"  # of ``x``; bfloat16 halves the transfer to the device


PLAIN = Augmentation()


class _Stream:
    """Batches of one source: positions of an endless stream of its epochs."""

    def __init__(
        self, source: Source, batch_size: int, seed: tuple[int, ...], augmentation: Augmentation
    ):
        self._fields = source, batch_size, seed, augmentation
        self.source, self._batch_size, self._seed, self._augmentation = self._fields
        # A batch touches few epochs, mostly one.
        self._epoch = functools.lru_cache(maxsize=2)(self._draw)

    def __reduce__(self):
        return _Stream, (_bare(self.source, self._augmentation), *self._fields[1:])

    def _draw(self, number: int) -> tuple[np.ndarray, ...]:
        """Of an epoch: order of the examples [N], flips [N] bool, positions of crops [N, 2]."""
        rng, n = np.random.default_rng((*self._seed, number)), len(self.source)
        drawn = rng.permutation(n), rng.random(n) < 0.5
        random_crop = self._augmentation.crop == "random"
        return (*drawn, rng.random((n, 2), np.float32)) if random_crop else drawn

    def _places(self, number: int, part: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(epochs, places in them) of the rows ``part`` of batch ``number``."""
        return np.divmod(number * self._batch_size + part, len(self.source))

    def drawn(self, number: int, part: np.ndarray) -> list[np.ndarray]:
        """The draws of ``_draw`` for the rows ``part`` of batch ``number``."""
        which, place = self._places(number, part)
        rows = [(place[which == e], self._epoch(int(e))) for e in np.unique(which)]
        pieces = zip(*([values[at] for values in epoch] for at, epoch in rows))
        return [np.concatenate(piece) for piece in pieces]

    def read(self, number: int, part: np.ndarray) -> tuple[Batch, np.ndarray]:
        """The rows ``part`` of batch ``number``, and whether each is flipped."""
        order, flipped, *at = self.drawn(number, part)
        batch = self.source.crop(order, at[0]) if at else self.source.read(order)
        if (rewrite := self._augmentation.captions) is not None:
            rows = zip(self._places(number, part)[0].tolist(), order.tolist())
            captions = [
                rewrite(self.source.captions[i], (*self._seed, CAPTIONS, epoch, i))
                for epoch, i in rows
            ]
            batch |= self.source.encode(captions)
        return batch, flipped


class _Shares:
    """Batches of a source with K shares: row r is the row r // K of the stream of share r mod K."""

    def __init__(self, source: Source, batch_size: int, seed: int, augmentation: Augmentation):
        self._fields = source, batch_size, seed, augmentation
        self.source, self._count = source, len(source.shares)
        self._starts, size = np.cumsum((0, *source.shares[:-1])), batch_size // self._count
        self._streams = [
            _Stream(subset(source, start + np.arange(n)), size, (seed, SHARES, k), augmentation)
            for k, (start, n) in enumerate(zip(self._starts, source.shares))
        ]

    def __reduce__(self):
        return _Shares, (_bare(self.source, self._fields[-1]), *self._fields[1:])

    def drawn(self, number: int, part: np.ndarray) -> list[np.ndarray]:
        """Indices of the examples in the whole source, and the other draws of a ``_Stream``."""
        pieces = []
        for stream, start, own in zip(self._streams, self._starts, self._rows(part)):
            order, *others = stream.drawn(number, own)
            pieces.append((start + order, *others))
        return [self._interleaved(part, values) for values in zip(*pieces)]

    def read(self, number: int, part: np.ndarray) -> tuple[Batch, np.ndarray]:
        """The rows ``part`` of batch ``number``, and whether each is flipped."""
        rows = zip(self._streams, self._rows(part))
        batches, flipped = zip(*(stream.read(number, own) for stream, own in rows))
        batch = {name: self._interleaved(part, [b[name] for b in batches]) for name in batches[0]}
        return batch, self._interleaved(part, flipped)

    def _rows(self, part: np.ndarray) -> list[np.ndarray]:
        """The rows of each stream that the rows ``part`` of a batch are."""
        return [part[part % self._count == k] // self._count for k in range(self._count)]

    def _interleaved(self, part: np.ndarray, pieces: Sequence[np.ndarray]) -> np.ndarray:
        values = np.empty((len(part), *pieces[0].shape[1:]), pieces[0].dtype)
        for k, piece in enumerate(pieces):
            values[part % self._count == k] = piece
        return values


def _bare(source: Source, augmentation: Augmentation) -> Source:
    """What another process needs of a source, to read it."""
    texts = {} if augmentation.captions else {"captions": (), "encode": None}
    return dataclasses.replace(source, buckets=(), pictures=None, **texts)


@dataclasses.dataclass(frozen=True)
class Batches:
    """step -> this process's part of the global batch."""

    streams: tuple[_Stream | _Shares, ...]
    schedule: Schedule | None
    batch_size: int
    seed: int
    part: np.ndarray  # rows of the global batch
    augmentation: Augmentation

    def examples(self, step: int) -> tuple[Source, np.ndarray]:
        """The source (or bucket) of a step's batch, and the indices of its examples there."""
        stream, number = self._stream(step)
        return stream.source, stream.drawn(number, self.part)[0]

    def _stream(self, step: int) -> tuple[_Stream | _Shares, int]:
        bucket, number = self.schedule(step) if self.schedule else (0, step)
        return self.streams[bucket], number

    def __call__(self, step: int) -> Batch:
        stream, number = self._stream(step)
        batch, flipped = stream.read(number, self.part)
        if "x_std" in batch:  # of the whole global batch: processes must not share noise
            rng = np.random.default_rng((self.seed, NOISE, step))
            shape = (self.batch_size, *stream.source.shape)
            noise = rng.standard_normal(shape, np.float32)[self.part]
            batch["x"] = batch["x"] + batch.pop("x_std") * noise
        if self.augmentation.flip:
            for picture in (batch[name] for name in PICTURES if name in batch):
                picture[flipped] = picture[flipped][:, :, ::-1]
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
    if (shares := len(source.shares)) and batch_size // process_count % shares:
        raise ValueError(
            f"batch_size={batch_size}: each process's part of it must be a multiple of {shares}, "
            f"to hold as many examples of each part of {source.name}"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0..{process_count - 1}, got {process_index}")
    if len(source) == 0:
        raise ValueError(f"{source.name} is empty")
    check(augmentation, source)
    local = batch_size // process_count
    part = np.arange(process_index * local, (process_index + 1) * local)
    schedule = None
    if source.buckets:
        schedule = Schedule(tuple(map(len, source.buckets)), batch_size, seed)
        streams = [
            _Stream(bucket, batch_size, (seed, BUCKETS, b), augmentation)
            for b, bucket in enumerate(source.buckets)
        ]
    elif source.shares:
        streams = [_Shares(source, batch_size, seed, augmentation)]
    else:
        streams = [_Stream(source, batch_size, (seed,), augmentation)]
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
    if augmentation.captions is not None and not (source.captions and source.encode):
        raise ValueError(
            f"captions are changed before a tokenizer reads them; {source.name} has none"
        )


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
