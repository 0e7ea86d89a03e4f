"""Samples in files: ADM's ``.npz``, this project's, a folder of either, or a folder of pictures."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffusion.data import images
from diffusion.evaluation import npz
from diffusion.evaluation.metrics.metric import Samples

PICTURES = ("arr_0", "image", "x")  # the first that a file has
SUBJECTS = ("arr_1", "label", "caption")


class Part(NamedTuple):
    """One file's samples."""

    array: npz.Member
    subjects: Sequence[Any]


def read(path: str, count: int = 0) -> Samples:
    """The first ``count`` samples of a file or folder, 0 being all.

    Args:
      path: an ``.npz`` with ``arr_0`` uint8 [N, H, W, 3] (and classes ``arr_1``), as ADM has it, or
        clips [N, T, H, W, 3]; one with ``x`` or ``image``, such as float pictures in [-1, 1], as
        --mode=sample leaves it; a folder of such files, in the order of their names; or a folder of
        pictures of one size.
      count: of samples.

    Raises:
      FileNotFoundError: there is no such path.
      ValueError: it is damaged, holds other numbers than expected, or fewer samples.
    """
    place = Path(path)
    if place.is_dir():
        files = sorted(place.glob("*.npz"))
        if not files:
            return _of_pictures(place, count)
    else:
        files = [place]
    parts = [_part(file) for file in files]
    shapes = {part.array.shape[1:] for part in parts}
    if len(shapes) > 1:
        raise ValueError(f"{path}: its files hold samples of several shapes: {sorted(shapes)}")
    if len({(part.array.dtype == np.uint8, bool(part.subjects)) for part in parts}) > 1:
        raise ValueError(
            f"{path}: some of its files hold uint8 or labels, and others do not: these are samples "
            "of several kinds"
        )
    ends = list(accumulate(part.array.shape[0] for part in parts))

    def draw(first: int, end: int) -> np.ndarray:
        rows, at = [], first
        while at < end:
            k = bisect_right(ends, at)
            start = ends[k] - parts[k].array.shape[0]
            rows.append(parts[k].array.rows(at - start, min(end, ends[k]) - start))
            at = min(end, ends[k])
        return np.concatenate(rows)

    subjects = [subject for part in parts for subject in part.subjects]
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as raw:
            digest.update(hashlib.file_digest(raw, "sha256").digest())
    number = _number(path, count, ends[-1])
    checksum = digest.hexdigest()[:16]
    return Samples(number, draw, subjects[:number], place.name, checksum)


def _part(path: Path) -> Part:
    arrays = npz.read(path)
    name = next((name for name in PICTURES if name in arrays), None)
    if name is None:
        raise ValueError(
            f"{path} holds no samples: expected {', '.join(PICTURES)}, got {', '.join(arrays)}"
        )
    array = arrays[name]
    known = bool(array.shape) and array.dtype.kind in "fiu"
    first = array.rows(0, min(array.shape[0], 100)) if known else np.zeros(0)
    span = f"[{np.nanmin(first):.3g}, {np.nanmax(first):.3g}]" if first.size else "nothing"
    if name == "arr_0" and (array.dtype != np.uint8 or len(array.shape) not in (4, 5)):
        kind = "pictures" if array.dtype.kind == "f" else "numbers"
        raise ValueError(
            f"{path}: arr_0 must be uint8 0..255 [N, H, W, 3], got {array.dtype} in {span} "
            f"{array.shape}: {kind} in [-1, 1] become such by numpy.round(127.5 * (x + 1)), or "
            "are read as they are under the name x"
        )
    if not known or (array.dtype.kind != "f" and array.dtype != np.uint8):
        raise ValueError(f"{path}: {name} must be uint8 or float, got {array.dtype} {array.shape}")
    if array.dtype == np.uint8:
        npz.check_bytes(array)
    elif len(array.shape) in (4, 5) and array.shape[-1] in (1, 3) and first.size:
        if np.nanmax(np.abs(first)) > 2:
            raise ValueError(
                f"{path}: {name} is float in {span}; expected [-1, 1], or uint8 0..255"
            )
        if np.nanmin(first) >= 0:
            raise ValueError(
                f"{path}: {name} is float in {span}; expected [-1, 1], where 0 is grey: pictures "
                "in [0, 1] become such by 2 * x - 1"
            )
    found = next((arrays[name] for name in SUBJECTS if name in arrays), None)
    if found is not None and found.shape != array.shape[:1]:
        raise ValueError(
            f"{path}: {array.shape[0]} samples but {math.prod(found.shape)} labels: {found.name} "
            f"is {list(found.shape)}"
        )
    return Part(array, [] if found is None else found.whole().tolist())


def _of_pictures(folder: Path, count: int) -> Samples:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in images.SUFFIXES)
    if not files:
        raise ValueError(f"{folder} holds neither .npz files nor pictures")
    number, size = _number(str(folder), count, len(files)), _seen(images.size, files[0])

    def draw(first: int, end: int) -> np.ndarray:
        x = np.empty((end - first, *size, 3), np.uint8)
        for row, file in zip(x, files[first:end]):
            picture = np.asarray(_seen(images.decode, file))
            if picture.shape[:2] != size:
                raise ValueError(
                    f"{file} is {picture.shape[0]} x {picture.shape[1]}, and {files[0].name} is "
                    f"{size[0]} x {size[1]}: pictures of one size are expected"
                )
            row[:] = picture
        return x

    digest = hashlib.sha256()
    for file in files[:number]:
        digest.update(file.read_bytes())
    return Samples(number, draw, (), folder.name, digest.hexdigest()[:16])


def _seen(look: Callable[[Path], Any], file: Path) -> Any:
    """What ``look`` sees in a picture; errors name the file."""
    try:
        return look(file)
    except images.UnreadableError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def _number(path: str, count: int, there: int) -> int:
    if count > there:
        raise ValueError(
            f"{path} has {there} samples, and config.evaluation.count={count} asks for more; 0 "
            "takes all"
        )
    return count or there
