"""Sources of images that are decoded, resized and cropped one by one, as they are read."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
from tqdm import tqdm

from diffusion.data import images
from diffusion.data.sources import Batch, Pictures, Source, subset, to_unit

BLOCK = 64  # images that a thread takes at a time


def from_pictures(
    name: str,
    pictures: Pictures,
    shape: tuple[int, int, int],
    *,
    background: tuple[int, int, int] = images.WHITE,
    class_names: tuple[str, ...] = (),
    num_classes: int | None = None,
) -> Source:
    """A source over images that are decoded, resized and cropped when they are read.

    ``pictures`` have a column ``label`` if there are labels. Each is read in the shape (H, W, C),
    see ``images.fit``, with the colour ``background`` (RGB) under transparent parts.
    """
    count = num_classes or len(class_names)
    read = partial(_read, pictures, shape, background)
    common = dict(levels=256, crop=read, pictures=pictures)
    return Source(name, pictures.count, shape, read, count, class_names, **common)


def resized(
    source: Source, shape: tuple[int, int, int], background: tuple[int, int, int] = images.WHITE
) -> Source:
    """The same pictures in another shape (H, W, C)."""
    crop = partial(_read, source.pictures, shape, background)
    return dataclasses.replace(source, shape=shape, read=crop, crop=crop, levels=256)


def in_buckets(source: Source, shapes: np.ndarray, background: tuple[int, int, int]) -> Source:
    """A source of pictures with buckets: examples grouped by their shapes (H, W), [N, 2]."""
    buckets = []
    for height, width in np.unique(shapes, axis=0).tolist():
        index = np.flatnonzero((shapes == (height, width)).all(1))
        shape = (height, width, source.shape[-1])
        buckets.append(subset(resized(source, shape, background), index))
    return dataclasses.replace(source, buckets=tuple(buckets))


def named(pictures: Pictures, i: int, function: Callable[[images.Picture], Any]) -> Any:
    """``function`` of picture ``i``; if that is unreadable, the error names it."""
    try:
        return function(pictures.get(i))
    except images.UnreadableError as error:
        raise images.UnreadableError(
            f"{pictures.name(i)} cannot be read: {error}. Mend or remove it; for a folder, "
            "config.data.on_error=skip finds such files and leaves them out"
        ) from error


def _read(
    pictures: Pictures,
    shape: tuple[int, int, int],
    background: tuple[int, int, int],
    index: np.ndarray,
    at: np.ndarray | None = None,
) -> Batch:
    height, width, channels = shape
    at = np.full((len(index), 2), 0.5) if at is None else at
    x = np.empty((len(index), *shape), np.uint8)
    options = {"channels": channels, "background": background, "covering": (height, width)}
    decode = partial(images.decode, **options)
    for row, (i, where) in enumerate(zip(index.tolist(), at.tolist())):
        x[row] = images.fit(named(pictures, i, decode), height, width, where)
    return {"x": to_unit(x)} | {name: values[index] for name, values in pictures.columns.items()}


def sizes(pictures: Pictures, *, progress: bool = False) -> np.ndarray:
    """(height, width) of every picture when upright, [N, 2], from their headers."""
    return np.array(each(pictures, images.size, "sizes", progress), np.int64).reshape(-1, 2)


def damaged(pictures: Pictures, *, progress: bool = False) -> dict[int, str]:
    """Index -> cause, of the pictures that cannot be decoded; decodes all of them on all cores."""

    def check(picture: images.Picture) -> str:
        try:
            images.decode(picture, covering=(1, 1))
        except images.UnreadableError as error:
            return str(error)
        return ""

    causes = each(pictures, check, "checking images", progress)
    return {i: cause for i, cause in enumerate(causes) if cause}


def each(pictures: Pictures, function: Callable, what: str, progress: bool) -> list[Any]:
    """``named`` of every picture, in order, on all cores, with a progress bar."""

    def block(start: int) -> list[Any]:
        indices = range(start, min(start + BLOCK, pictures.count))
        return [named(pictures, i, function) for i in indices]

    results, bar = [], tqdm(total=pictures.count, desc=what, disable=not progress, leave=False)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, bar:
        for values in pool.map(block, range(0, pictures.count, BLOCK)):
            results += values
            bar.update(len(values))
    return results
