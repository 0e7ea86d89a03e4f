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
    background: tuple[int, int, int] = (255, 255, 255),
    class_names: tuple[str, ...] = (),
    num_classes: int | None = None,
    note: str = "",
) -> Source:
    """A source over images that are decoded, resized and cropped when they are read.

    Args:
      name: see ``Source``.
      pictures: the images, with a column ``label`` if they have labels.
      shape: (H, W, C) of each when read, see ``images.fit``.
      background: RGB under transparent parts.
      class_names: names of the classes.
      num_classes: by default the number of names.
      note: see ``Source``.
    """
    read = partial(_read, pictures, shape, background)
    return Source(
        name,
        pictures.count,
        shape,
        read,
        num_classes or len(class_names),
        class_names,
        levels=256,
        note=note,
        crop=read,
        pictures=pictures,
    )


def resized(
    source: Source, shape: tuple[int, int, int], background: tuple[int, int, int] = (255, 255, 255)
) -> Source:
    """The same pictures in another shape (H, W, C)."""
    crop = partial(_read, source.pictures, shape, background)
    return dataclasses.replace(source, shape=shape, read=crop, crop=crop, levels=256)


def in_buckets(
    source: Source, shapes: np.ndarray, background: tuple[int, int, int] = (255, 255, 255)
) -> Source:
    """A source of pictures with buckets: examples grouped by their shapes (H, W), [N, 2]."""
    buckets = []
    for height, width in np.unique(shapes, axis=0).tolist():
        index = np.flatnonzero((shapes == (height, width)).all(1))
        shape = (height, width, source.shape[-1])
        buckets.append(subset(resized(source, shape, background), index))
    return dataclasses.replace(source, buckets=tuple(buckets))


def unreadable(pictures: Pictures, i: int, error: Exception) -> images.UnreadableError:
    """The error that names picture ``i``."""
    return images.UnreadableError(
        f"{pictures.name(i)} cannot be read: {error}. Mend or remove it; for a folder, "
        "config.data.on_error=skip finds such files and leaves them out"
    )


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
    for row, (i, where) in enumerate(zip(index.tolist(), at.tolist())):
        try:
            image = images.decode(pictures.get(i), **options)
        except images.UnreadableError as error:
            raise unreadable(pictures, i, error) from error
        x[row] = images.fit(image, height, width, where)
    return {"x": to_unit(x)} | {name: values[index] for name, values in pictures.columns.items()}


def sizes(pictures: Pictures, *, progress: bool = False) -> np.ndarray:
    """(height, width) of every picture when upright, [N, 2], from their headers.

    Raises:
      UnreadableError: a picture has no header; names it.
    """
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
    """``function`` of every picture, in order, on all cores, with a progress bar.

    An ``UnreadableError`` gets the picture's name.
    """

    def block(start: int) -> list[Any]:
        return [call(i) for i in range(start, min(start + BLOCK, pictures.count))]

    def call(i: int) -> Any:
        try:
            return function(pictures.get(i))
        except images.UnreadableError as error:
            raise unreadable(pictures, i, error) from error

    results, bar = [], tqdm(total=pictures.count, desc=what, disable=not progress, leave=False)
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool, bar:
        for values in pool.map(block, range(0, pictures.count, BLOCK)):
            results += values
            bar.update(len(values))
    return results
