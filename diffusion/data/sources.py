"""Random-access data: ``len(source)``, ``source[i]``, and whole batches by ``source.read``.

Each function returns a ``Source``. It gives images as float32 in [-1, 1], NHWC. Small sets are kept
in memory as uint8 and converted batch by batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.data import densities
from diffusion.data.images import Picture

Batch = dict[str, np.ndarray]
Read = Callable[..., Batch]  # indices [B], and where pictures are cropped positions [B, 2]

MOST_CLASSES = 1_000_000
"""A larger number is a mistake: the labels are then other numbers."""


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Images as they are stored, of any size and mode.

    Attributes:
      count: number of images.
      get: i -> a file, its contents, or uint8 [H, W] or [H, W, C].
      name: i -> the image's name in messages.
      columns: further values of each image, ``label`` or tokens; each is indexed by indices [B].
    """

    count: int
    get: Callable[[int], Picture]
    name: Callable[[int], str]
    columns: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples that can be read in any order.

    Attributes:
      name: of the data in logs and pictures.
      size: number of examples.
      shape: shape of one example's ``x``: (H, W, C), or (2,) for points.
      read: indices [B] -> {'x': [B, *shape] float32, 'label': [B] int32 where there are labels},
        arrays that belong to the caller.
      num_classes: 0 without labels.
      class_names: [num_classes] names, for pictures.
      levels: number of grey levels of x, evenly spaced in [-1, 1]; 0 for continuous values.
      note: a remark that belongs beside every result obtained with the data.
      captions: one per example, or none at all.
      encode: captions [B] -> their arrays in a batch, {'tokens': [B, L] int32, ...}; the empty
        caption stands for no caption.
      vocabulary: ids of the tokens that ``encode`` numbers anew, from 1; empty if it does not.
      crop: indices [B] and positions of crops, [B, 2] in [0, 1] from the top left -> as ``read``,
        which crops in the middle; None if there is nothing to crop.
      buckets: the same examples, grouped by the shape that fits best; empty if all have one shape.
      shares: numbers of examples of parts, one after another, of which each batch holds equally
        many: example i of a batch is of part i mod len(shares); empty if there is one part.
      pictures: the images as they are stored, if they are decoded one by one.
      view: how examples are shown, a name of ``evaluation.views.VIEWS``.
    """

    name: str
    size: int
    shape: tuple[int, ...]
    read: Callable[[np.ndarray], Batch]
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    levels: int = 0
    note: str = ""
    captions: tuple[str, ...] = ()
    encode: Callable[[Sequence[str]], Batch] | None = None
    vocabulary: tuple[int, ...] = ()
    crop: Callable[[np.ndarray, np.ndarray], Batch] | None = None
    buckets: tuple[Source, ...] = ()
    shares: tuple[int, ...] = ()
    pictures: Pictures | None = None
    view: str = "images"

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> Batch:
        """Example ``i`` in 0..len-1, without the batch axis."""
        if not 0 <= i < self.size:
            raise IndexError(f"{self.name} has examples 0..{self.size - 1}, got {i}")
        return {name: value[0] for name, value in self.read(np.asarray([i])).items()}

    def all(self) -> Batch:
        """Every example, in order; only for data that fits into memory."""
        return self.read(np.arange(self.size))


def read_npz(path: str | Path) -> Batch:
    """All arrays of an ``.npz``, by name; a ValueError gives the reason why it cannot be read."""
    try:
        with np.load(path) as file:
            return {name: file[name] for name in file.files}
    except FileNotFoundError:
        raise
    except Exception as error:  # zipfile's, pickle's, NumPy's, zlib's
        raise ValueError(f"{path} cannot be read: {unreadable(error)}") from error


def unreadable(error: Exception) -> str:
    """Why a file of arrays cannot be read, in a few words, without the libraries' internals."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "Object arrays" in str(error):
        return "it holds an array of Python objects; expected numbers or texts"
    return "it is damaged, or its contents do not match its name"


def from_arrays(
    name: str,
    x: np.ndarray,
    label: np.ndarray | None = None,
    *,
    scale: float = 1.0,
    class_names: tuple[str, ...] = (),
    num_classes: int | None = None,
    levels: int = 0,
) -> Source:
    """A source over arrays in memory: x [N, ...] and class indices ``label`` [N], or None.

    uint8 is mapped from 0..255 to [-1, 1] and has 256 levels; floats are multiplied by ``scale``.
    num_classes is by default the number of names, or max(label) + 1 without names.
    """
    if label is not None:
        if len(label) != len(x):
            raise ValueError(f"{name}: {len(x)} examples but {len(label)} labels")
        label = np.asarray(label, np.int32)
        num_classes = num_classes or len(class_names) or int(label.max(initial=-1)) + 1
    read = partial(_read_arrays, x, label, scale)
    levels = 256 if x.dtype == np.uint8 else levels
    return Source(name, len(x), x.shape[1:], read, num_classes or 0, class_names, levels)


def _read_arrays(x: np.ndarray, label: np.ndarray | None, scale: float, index: np.ndarray) -> Batch:
    rows = x[index]
    rows = to_unit(rows) if rows.dtype == np.uint8 else rows.astype(np.float32) * np.float32(scale)
    return {"x": rows} if label is None else {"x": rows, "label": label[index]}


def with_columns(source: Source, columns: Batch, without: tuple[str, ...] = ()) -> Source:
    """The same examples with further values [N, ...] in each batch, and ``without`` others."""
    joined = partial(_joined, columns, without)
    if (pictures := source.pictures) is not None:
        kept = {key: values for key, values in pictures.columns.items() if key not in without}
        pictures = dataclasses.replace(pictures, columns=kept | dict(columns))
    read, crop = (f and partial(joined, f) for f in (source.read, source.crop))
    return dataclasses.replace(source, read=read, crop=crop, pictures=pictures)


def _joined(
    columns: Batch, without: tuple[str, ...], read: Callable, index: np.ndarray, *at: np.ndarray
) -> Batch:
    batch = {name: values for name, values in read(index, *at).items() if name not in without}
    return batch | {name: values[index] for name, values in columns.items()}


def subset(source: Source, index: np.ndarray) -> Source:
    """The examples ``index`` of a source, in that order."""
    pictures = source.pictures
    if pictures is not None:
        get, name = (partial(_at, f, index) for f in (pictures.get, pictures.name))
        columns = {key: values[index] for key, values in pictures.columns.items()}
        pictures = Pictures(len(index), get, name, columns)
    read, crop = (f and partial(_read_subset, f, index) for f in (source.read, source.crop))
    captions = tuple(source.captions[i] for i in index) if source.captions else ()
    changes = dict(read=read, crop=crop, captions=captions, pictures=pictures)
    return dataclasses.replace(source, size=len(index), buckets=(), shares=(), **changes)


def _at(function: Callable, index: np.ndarray, i: int) -> Any:
    return function(int(index[i]))


def affordable(source: Source, limit: int = 2**31) -> Source:
    """A source of at most ``limit`` bytes: all examples, or as many as fit, evenly spread."""
    count = max(1, limit // (4 * int(np.prod(source.shape))))
    if count >= len(source):
        return source
    return subset(source, np.linspace(0, len(source) - 1, count).astype(np.int64))


def _read_subset(read: Callable, index: np.ndarray, which: np.ndarray, *at: np.ndarray) -> Batch:
    return read(index[which], *at)


def digits(split: str) -> Source:
    """The 1,797 handwritten digits of scikit-learn: [8, 8, 1], ten classes, no download.

    The split is fixed: of every class, in an order shuffled with seed 0, a share of 500 / 1797
    is held out, which makes 1,297 digits for ``train`` and 500 for ``test``.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    check_split(split, "digits")
    x, label = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(x)), test_size=500, random_state=0, stratify=label)
    index = np.sort(parts[0] if split == "train" else parts[1])
    x = x[index].reshape(-1, 8, 8, 1).astype(np.float32) / 8 - 1
    names = tuple("0123456789")
    return from_arrays("digits", x, label[index], class_names=names, levels=17)  # 0..16


def latents(path: str | Path, *, scale: float = 1.0, num_classes: int | None = None) -> Source:
    """Latents computed beforehand, times ``scale`` (0.18215 for Stable Diffusion 1 and 2).

    The ``.npz`` at ``path`` holds ``latents`` [N, h, w, C] of any float type and ``label`` [N] int.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no latents at {path}: expected an .npz with 'latents' [N, h, w, C] and 'label' [N]"
        )
    file = read_npz(path)
    if missing := {"latents", "label"} - set(file):
        raise ValueError(f"{path} lacks {sorted(missing)}, it has {sorted(file)}")
    x, label = file["latents"], file["label"]
    if x.ndim != 4 or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"'latents' must be float [N, h, w, C], got {x.dtype} {x.shape}")
    return from_arrays(path.stem, x, label, scale=scale, num_classes=num_classes)


def points(name: str, n: int = 100_000, seed: int = 0) -> Source:
    """``n`` points of a two-dimensional density (see ``densities``), without labels."""
    made = from_arrays(name, densities.sample(name, n, np.random.default_rng(seed)))
    return dataclasses.replace(made, view="points")


def check_split(split: str, name: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"{name} has the splits 'train' and 'test', got {split!r}")


def to_unit(x: np.ndarray) -> np.ndarray:
    """0..255 -> [-1, 1] float32, exact at both ends."""
    return x / np.float32(127.5) - np.float32(1)
