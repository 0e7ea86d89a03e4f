"""Images in NumPy's files: an ``.npz``, an ``.npy``, or a folder of ``.npy``.

    FILE.npz or DIR/                  x or image(s), perhaps label(s) and caption(s), N of each
    FILE.npy                          only images
    DIR/train.npz, DIR/test.npz       any of these in splits; also DIR/train/, DIR/test/ and .npy

Files of type ``.npy`` are mapped into memory and not read, so they may be larger than the memory.
"""

from __future__ import annotations

import dataclasses
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from diffusion.data.folder import HELD_OUT, held_out_by_hash
from diffusion.data.image_source import from_pictures
from diffusion.data.images import WHITE
from diffusion.data.sources import (
    MOST_CLASSES,
    Batch,
    Pictures,
    Source,
    check_split,
    subset,
    to_unit,
    unreadable,
)

IMAGES = ("x", "image", "images")
LABELS = ("label", "labels", "y")
CAPTIONS = ("caption", "captions", "text")
FIRST = 256  # examples whose values are checked before training


@dataclasses.dataclass(frozen=True)
class Mapped:
    """An array in an ``.npy``, mapped into memory in each process that reads it."""

    path: str

    @cached_property
    def array(self) -> np.ndarray:
        """[N, ...]."""
        return np.load(self.path, mmap_mode="r")

    def __reduce__(self):  # another process gets only the path
        return Mapped, (self.path,)


@dataclasses.dataclass(frozen=True)
class Held:
    """An array in memory."""

    array: np.ndarray


def source(
    name: str,
    path: str | Path,
    split: str,
    held_out: float = 0.05,
    *,
    background: tuple[int, int, int] = WHITE,
) -> Source:
    """The images of a split, ``train`` or ``test``.

    uint8 is mapped from 0..255 to [-1, 1]; floats must lie in [-1, 1]. Images are [N, H, W] or
    [N, H, W, 1, 3 or 4]; the fourth channel, of uint8 alone, is opacity, over ``background`` (RGB).
    If there are no splits, the share ``held_out`` of the images is ``test``, always the same ones.
    """
    check_split(split, name)
    path = Path(path)
    whole, part = _files(path, split)
    made = _source(name, part, whole, background)
    if part != path:
        return made
    numbers = [str(i) for i in range(len(made))]
    chosen = held_out_by_hash(numbers, held_out, str(path))
    return subset(made, np.flatnonzero(chosen if split == "test" else ~chosen))


def _files(path: Path, split: str) -> tuple[Path, Path]:
    """(the file or folder that defines the number of classes, that of the split)."""
    if path.is_dir():

        def first(*names: str) -> Path | None:
            files = (path / f"{name}{end}" for name in names for end in ("", ".npz", ".npy"))
            return next((file for file in files if file.exists()), None)

        train, test = first("train"), first(*HELD_OUT)
        if train and test:
            return train, train if split == "train" else test
    elif not path.exists() or path.suffix not in (".npz", ".npy"):
        raise FileNotFoundError(
            f"no arrays at {path}: expected an .npz, an .npy, or a folder of .npy"
        )
    return path, path


def _read(path: Path) -> dict[str, Held | Mapped]:
    if path.is_dir():
        return {file.stem: Mapped(str(file)) for file in sorted(path.glob("*.npy"))}
    try:
        if path.suffix == ".npy":
            np.load(path, mmap_mode="r")
            return {"x": Mapped(str(path))}
        with np.load(path) as file:
            used = (*IMAGES, *LABELS, *CAPTIONS)
            return {key: Held(file[key] if key in used else None) for key in file.files}
    except Exception as error:  # zipfile's, pickle's, NumPy's, zlib's
        raise ValueError(f"{path} cannot be read: {unreadable(error)}") from error


def _source(name: str, path: Path, counted: Path, background: tuple[int, int, int]) -> Source:
    arrays = _read(path)
    stored, key = _first(arrays, IMAGES)
    if stored is None:
        raise ValueError(f"{path} has no x, image or images; it has {', '.join(arrays) or 'none'}")
    x = stored.array
    if not isinstance(x, np.ndarray):
        raise ValueError(f"{path}: {key} is damaged: it holds no array")
    shape = _check_images(x, f"{path}: {key}")
    label, key = _first(arrays, LABELS)
    num_classes, columns = 0, {}
    if label is not None:
        label = _check_labels(np.asarray(label.array), len(x), f"{path}: {key}")
        num_classes, columns = int(label.max(initial=-1)) + 1, {"label": label}
        trained = _first(_read(counted), LABELS)[0] if counted != path else None
        if trained is not None:
            known = int(np.asarray(trained.array).max(initial=-1)) + 1
            if num_classes > known:
                raise ValueError(f"{path}: {key} has {num_classes - 1}, which {counted} lacks")
            num_classes = known
    captions, key = _first(arrays, CAPTIONS)
    texts = () if captions is None else tuple(str(text) for text in captions.array)
    if captions is not None and (len(texts) != len(x) or captions.array.dtype.kind != "U"):
        raise ValueError(f"{path}: {key} must be {len(x)} strings, one per image")
    rows = partial(_rows, stored, columns, str(path))
    if x.dtype == np.uint8:
        named = partial("{}, image {}".format, path)
        pictures = Pictures(len(x), partial(_row, stored), named, columns)
        colours = 1 if shape[2] == 1 else 3
        made = from_pictures(name, pictures, (*shape[:2], colours), background=background)
        if shape[2] != 4:  # without opacity, whole batches are converted at once
            made = dataclasses.replace(made, read=rows)
    else:
        made = Source(name, len(x), shape, rows)
    return dataclasses.replace(made, num_classes=num_classes, captions=texts)


def _first(arrays: dict, keys: tuple[str, ...]) -> tuple[Held | Mapped | None, str]:
    key = next((key for key in keys if key in arrays), "")
    return arrays.get(key), key


def _check_images(x: np.ndarray, at: str) -> tuple[int, int, int]:
    """(H, W, C) of an array of images; checks its shape, its type and its first values."""
    floats = np.issubdtype(x.dtype, np.floating)
    if x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3, 4):
        raise ValueError(
            f"{at} has the shape {x.shape}, channels first; expected [N, H, W, C]: "
            "x.transpose(0, 2, 3, 1)"
        )
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3, 4)) or not x.size:
        raise ValueError(
            f"{at} has the shape {x.shape}; expected [N, H, W] or [N, H, W, 1, 3 or 4]"
        )
    if x.dtype != np.uint8 and not floats:
        raise ValueError(f"{at} is {x.dtype}; expected uint8, or floats in [-1, 1]")
    shape = (*x.shape[1:3], x.shape[3] if x.ndim == 4 else 1)
    if floats:
        if shape[2] == 4:
            raise ValueError(f"{at} has four channels; only uint8 may have an opacity")
        low, high = _check_range(np.asarray(x[:FIRST], np.float32), at)
        if low >= 0 and high > 0:
            raise ValueError(
                f"{at} lies in [{low:g}, {high:g}]; expected uint8, or floats in [-1, 1]: 2 * x - 1"
            )
    return shape


def _check_range(x: np.ndarray, at: str) -> tuple[float, float]:
    low, high = float(x.min()), float(x.max())
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(
            f"{at} has values {low:g} to {high:g}; expected uint8, or floats in [-1, 1]"
        )
    return low, high


def _check_labels(label: np.ndarray, count: int, at: str) -> np.ndarray:
    if label.shape != (count,):
        raise ValueError(f"{at} has the shape {label.shape}; expected ({count},), one per image")
    whole = np.issubdtype(label.dtype, np.integer)
    if not whole or label.min(initial=0) < 0 or label.max(initial=0) >= MOST_CLASSES:
        raise ValueError(
            f"{at} must be whole numbers from 0 (of at most {MOST_CLASSES:,} classes), got "
            f"{label.dtype}, {label.min()} to {label.max()}"
        )
    return label.astype(np.int32)


def _row(stored: Held | Mapped, i: int) -> np.ndarray:
    return np.asarray(stored.array[i])


def _rows(stored: Held | Mapped, columns: Batch, path: str, index: np.ndarray) -> Batch:
    x = np.asarray(stored.array[index])
    if x.dtype == np.uint8:
        x = to_unit(x)
    else:
        x = x.astype(np.float32)
        _check_range(x, f"{path}, images {index.min()} to {index.max()}")
    x = x if x.ndim == 4 else x[..., None]
    return {"x": x} | {key: values[index] for key, values in columns.items()}
