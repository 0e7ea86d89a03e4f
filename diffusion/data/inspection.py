"""Statistics of data before anything is trained on them: sizes, duplicates, classes, captions."""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.data import image_source, images
from diffusion.data.sources import Batch, Pictures, Source

BLOCK = 256  # examples read at once


@dataclasses.dataclass(frozen=True)
class Look:
    """The properties of one stored image."""

    size: tuple[int, int]  # (height, width) when upright; (0, 0) if it is damaged
    mode: str  # see ``images.mode``
    digest: bytes  # SHA-256 of the file or array
    damage: str = ""  # why it cannot be decoded; empty if it can be


def look(stored: Pictures, *, progress: bool = False) -> list[Look]:
    """Reads and decodes every image once, on all cores."""

    def one(picture: images.Picture) -> Look:
        try:
            data = picture.read_bytes() if isinstance(picture, Path) else picture
            raw = data if isinstance(data, bytes) else np.ascontiguousarray(data)
            digest = hashlib.sha256(raw).digest()
            images.decode(data, covering=(1, 1))
            return Look(images.size(data), images.mode(data), digest)
        except (images.UnreadableError, OSError) as error:
            return Look((0, 0), "", b"", str(error))

    return image_source.each(stored, one, "looking at images", progress)


def digests(source: Source) -> list[bytes]:
    """SHA-256 of every example's ``x``, for data that are not stored as images."""
    found = []
    for start in range(0, len(source), BLOCK):
        x = source.read(np.arange(start, min(start + BLOCK, len(source))))["x"]
        found += [hashlib.sha256(np.ascontiguousarray(row)).digest() for row in x]
    return found


def sizes(looks: Sequence[Look], target: tuple[int, int]) -> dict[str, Any]:
    """The sizes of images before they are resized to cover ``target`` (height, width)."""
    shapes = np.array([look.size for look in looks if not look.damage])
    if not len(shapes):
        return {}
    names, aspects = ("min", "median", "max"), shapes[:, 1] / shapes[:, 0]  # width / height
    aspects = np.quantile(aspects, (0, 0.5, 1))
    count = Counter(f"{w} x {h}" for h, w in shapes.tolist())
    return {
        "different": len(count),
        "most_common": dict(count.most_common(10)),
        "short_side": _range(shapes.min(1)),
        "aspect": {name: round(float(value), 3) for name, value in zip(names, aspects)},
        "enlarged": float(np.mean((shapes < np.array(target)).any(1))),
    }


def duplicates(parts: Mapping[str, Sequence[bytes]], names: Mapping[str, Any]) -> dict[str, Any]:
    """Examples that are equal to the byte, within and between splits.

    ``parts`` holds the digests by split, empty for damaged files, which are left out; ``names``
    holds by split a function from an index to the example's name.
    """
    where: dict[bytes, list[tuple[str, int]]] = {}
    for split, values in parts.items():
        for i, value in enumerate(values):
            if value:
                where.setdefault(value, []).append((split, i))
    groups = [places for places in where.values() if len(places) > 1]
    between = [places for places in groups if len({split for split, _ in places}) > 1]
    return {
        "groups": len(groups),
        "examples": sum(len(places) for places in groups),
        "groups_between_splits": len(between),
        "first": [[names[split](i) for split, i in g[:4]] for g in (between or groups)[:5]],
    }


def classes(label: np.ndarray, names: Sequence[str], count: int) -> dict[str, Any]:
    """Examples of each class."""
    found = np.bincount(label, minlength=count)
    names = names or [str(k) for k in range(count)]
    return {
        "count": count,
        "examples": dict(zip(names, found.tolist())),
        "smallest": int(found.min()),
        "largest": int(found.max()),
        "empty": int((found == 0).sum()),
    }


def captions(texts: Sequence[str]) -> dict[str, Any]:
    """The lengths of captions in words."""
    words = np.array([len(text.split()) for text in texts])
    return {"different": len(set(texts)), "words": _range(words)}


def tokens(tokenizer: Any, texts: Sequence[str], length: int) -> dict[str, Any]:
    """The lengths of captions in tokens, start and end included, and the share that is cut."""
    ids = tokenizer(list(texts), verbose=False)["input_ids"]
    lengths = np.array([len(row) for row in ids])
    unknown, end = tokenizer.unk_token_id, tokenizer.eos_token_id
    # CLIP's end token is also its unknown token; byte pairs never need the latter.
    wrong = 0 if unknown in (None, end) else sum(row.count(unknown) for row in ids)
    return {
        "tokens": _range(lengths),
        "longest_allowed": length,
        "cut": float(np.mean(lengths > length)),
        "unknown": wrong / int(lengths.sum()),
    }


class Moments:
    """Mean and standard deviation by channel, and a histogram, over batches."""

    EDGES = np.linspace(-1, 1, 65)

    def __init__(self):
        self._count, self._sum, self._square, self.histogram = 0, 0.0, 0.0, 0

    def add(self, batch: Batch) -> None:
        """Adds the ``x`` of a batch, [B, ..., C]."""
        x = np.asarray(batch["x"], np.float64).reshape(-1, batch["x"].shape[-1])
        self._count += len(x)
        self._sum, self._square = self._sum + x.sum(0), self._square + (x**2).sum(0)
        counts = [np.histogram(channel, self.EDGES)[0] for channel in x.clip(-1, 1).T]
        self.histogram = self.histogram + np.stack(counts)

    def result(self) -> dict[str, Any]:
        """Mean and standard deviation of each channel, and the deviation of all values together."""
        mean, square = self._sum / self._count, self._square / self._count
        whole = square.mean() - mean.mean() ** 2
        return {
            "mean": [round(float(m), 4) for m in mean],
            "std": [round(float(np.sqrt(max(s, 0))), 4) for s in square - mean**2],
            "std_of_all": round(float(np.sqrt(max(whole, 0))), 4),
        }


def _range(values: np.ndarray) -> dict[str, float]:
    """Smallest, middle and largest of integers."""
    low, high = int(values.min()), int(values.max())
    return {"min": low, "median": float(np.median(values)), "max": high}
