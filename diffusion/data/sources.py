"""Random-access data: ``len(source)``, ``source[i]``, and whole batches by ``source.read``.

Each function returns a ``Source``. Images leave it as float32 in [-1, 1], NHWC; small sets lie
in memory as uint8 and are converted batch by batch.
"""

from __future__ import annotations

import dataclasses
import gzip
import importlib.util
import io
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.data import densities

Batch = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Source:
    """Examples that can be read in any order.

    Attributes:
      name: what the data is called in logs and pictures.
      size: number of examples.
      shape: shape of one example's ``x``: (H, W, C), or (2,) for points.
      read: indices [B] -> {'x': [B, *shape] float32, 'label': [B] int32 where there are labels},
        arrays that belong to the caller.
      num_classes: 0 without labels.
      class_names: [num_classes] names, for pictures.
      levels: number of grey levels, evenly spaced in [-1, 1], of which x is made; 0: continuous.
      note: what must be said beside every result obtained with the data.
      captions: one per example, where there are any.
      encode: captions [B] -> what a batch holds of them, {'tokens': [B, L] int32, ...}; the empty
        caption stands for none.
      vocabulary: number of different tokens; 0 without.
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
    vocabulary: int = 0

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


def from_arrays(
    name: str,
    x: np.ndarray,
    label: np.ndarray | None = None,
    *,
    scale: float = 1.0,
    class_names: tuple[str, ...] = (),
    num_classes: int | None = None,
    levels: int = 0,
    note: str = "",
) -> Source:
    """A source over arrays in memory.

    Args:
      name: see ``Source``.
      x: [N, ...]; uint8 is mapped from 0..255 to [-1, 1], floats are multiplied by ``scale``.
      label: [N] int class indices, or None.
      scale: for float data only.
      class_names: one name per class.
      num_classes: if there are no names; by default the number of names, or max(label) + 1.
      levels: of float data, see ``Source``; uint8 has 256.
      note: see ``Source``.
    """
    if label is not None:
        if len(label) != len(x):
            raise ValueError(f"{name}: {len(x)} examples but {len(label)} labels")
        label = np.asarray(label, np.int32)
        num_classes = num_classes or len(class_names) or int(label.max(initial=-1)) + 1
    read = partial(_read_arrays, x, label, scale)
    levels = 256 if x.dtype == np.uint8 else levels
    return Source(name, len(x), x.shape[1:], read, num_classes or 0, class_names, levels, note)


def _read_arrays(x: np.ndarray, label: np.ndarray | None, scale: float, index: np.ndarray) -> Batch:
    rows = x[index]
    rows = _to_unit(rows) if rows.dtype == np.uint8 else rows.astype(np.float32) * np.float32(scale)
    return {"x": rows} if label is None else {"x": rows, "label": label[index]}


def digits(split: str) -> Source:
    """The 1,797 handwritten digits of scikit-learn: [8, 8, 1], ten classes, no download.

    The split is fixed: of every class, in an order shuffled with seed 0, a share of 500 / 1797
    is held out, which makes 1,297 digits for ``train`` and 500 for ``test``. (The original
    authors' separation by writer is not contained in scikit-learn's copy.)
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


def mnist(split: str, data_dir: str | Path | None = None, *, padding: int = 0) -> Source:
    """MNIST: [28, 28, 1], or [32, 32, 1] with ``padding=2`` (black); ten classes.

    Args:
      split: ``train`` (60,000) or ``test`` (10,000).
      data_dir: a folder with the original ``*-ubyte.gz`` files; where it holds none (or is None)
        MNIST comes from TFDS, with ``data_dir`` as TFDS's folder.
      padding: black pixels added on each side.
    """
    check_split(split, "mnist")
    prefix = "train" if split == "train" else "t10k"
    folder = Path(data_dir) if data_dir else None
    if folder and (folder / f"{prefix}-images-idx3-ubyte.gz").exists():
        x = _read_idx(folder / f"{prefix}-images-idx3-ubyte.gz")[..., None]
        label = _read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz")
    else:
        x, label = _load_tfds("mnist", split, data_dir)
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return from_arrays("mnist", x, label, class_names=tuple("0123456789"))


def cifar10(split: str, data_dir: str | Path | None = None) -> Source:
    """CIFAR-10: [32, 32, 3], ten classes, 50,000 ``train`` and 10,000 ``test`` examples.

    Args:
      split: ``train`` or ``test``.
      data_dir: a folder with ``cifar10_jpegq75.npz``, a copy compressed as JPEG at quality 75
        (arrays ``train_jpeg``, ``train_offsets``, ``train_labels``, ``test_*``, ``classes``). It
        is lossy, about 30 dB; the source's ``note`` says so. Otherwise the original set comes
        from TFDS, with ``data_dir`` as TFDS's folder.
    """
    check_split(split, "cifar10")
    path = Path(data_dir) / "cifar10_jpegq75.npz" if data_dir else None
    names = ("airplane", "automobile", "bird", "cat", "deer")
    names += ("dog", "frog", "horse", "ship", "truck")
    if path is None or not path.exists():
        return from_arrays("cifar10", *_load_tfds("cifar10", split, data_dir), class_names=names)
    with np.load(path) as file:
        data, offsets = file[f"{split}_jpeg"], file[f"{split}_offsets"]
        label = file[f"{split}_labels"]
        names = tuple(str(c) for c in file["classes"])
    images = [_decode(data[a:b].tobytes()) for a, b in itertools.pairwise(offsets)]
    note = "CIFAR-10 from a lossy copy (JPEG, quality 75, about 30 dB)"
    return from_arrays("cifar10", np.stack(images), label, class_names=names, note=note)


def tfds(name: str, split: str, data_dir: str | Path | None = None) -> Source:
    """Any prepared TFDS image set by name, decoded when read; images must share one size.

    ``image`` becomes ``x`` in [-1, 1] and ``label`` (if there is one) ``label``. ``split`` is in
    TFDS's notation (``train``, ``train[:90%]``, ...).
    """
    builder, examples = _open_tfds(name, split, data_dir)
    features = builder.info.features
    if "image" not in features:
        raise ValueError(f"{name} has no feature 'image', only {', '.join(features)}")
    shape = examples[0]["image"].shape
    num_classes, names = 0, ()
    if "label" in features:
        num_classes, names = features["label"].num_classes, tuple(features["label"].names)
    read = partial(_read_examples, examples, num_classes > 0)
    return Source(name, len(examples), shape, read, num_classes, names, levels=256)


def latents(path: str | Path, *, scale: float = 1.0, num_classes: int | None = None) -> Source:
    """Latents computed beforehand, from an ``.npz`` with ``latents`` and ``label``.

    Args:
      path: file with ``latents`` [N, h, w, C] of any float type and ``label`` [N] int.
      scale: factor applied when read (0.18215 for the Stable Diffusion 1 and 2 autoencoder).
      num_classes: by default max(label) + 1.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"no latents at {path}: expected an .npz with 'latents' [N, h, w, C] and 'label' [N]"
        )
    with np.load(path) as file:
        missing = {"latents", "label"} - set(file.files)
        if missing:
            raise ValueError(f"{path} lacks {sorted(missing)}, it has {sorted(file.files)}")
        x, label = file["latents"], file["label"]
    if x.ndim != 4 or not np.issubdtype(x.dtype, np.floating):
        raise ValueError(f"'latents' must be float [N, h, w, C], got {x.dtype} {x.shape}")
    return from_arrays(path.stem, x, label, scale=scale, num_classes=num_classes)


def points(name: str, n: int = 100_000, seed: int = 0) -> Source:
    """``n`` points of a two-dimensional density (see ``densities``), without labels."""
    return from_arrays(name, densities.sample(name, n, np.random.default_rng(seed)))


def check_split(split: str, name: str) -> None:
    if split not in ("train", "test"):
        raise ValueError(f"{name} has the splits 'train' and 'test', got {split!r}")


def _to_unit(x: np.ndarray) -> np.ndarray:
    """0..255 -> [-1, 1] float32, exact at both ends."""
    return x / np.float32(127.5) - np.float32(1)


def _read_idx(path: Path) -> np.ndarray:
    """The idx format of MNIST: 2 zero bytes, type 8 (uint8), rank, big-endian sizes, data."""
    raw = gzip.decompress(path.read_bytes())
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _open_tfds(name: str, split: str, data_dir: str | Path | None) -> tuple[Any, Any]:
    import tensorflow_datasets

    builder = tensorflow_datasets.builder(name, data_dir=data_dir, file_format="array_record")
    try:
        return builder, builder.as_data_source(split=split)
    except (KeyError, AssertionError, OSError) as error:
        if builder.info.splits:  # prepared: the fault lies elsewhere, e.g. in the split's name
            raise
        if importlib.util.find_spec("tensorflow"):
            builder.download_and_prepare()
            return builder, builder.as_data_source(split=split)
        where = "" if data_dir is None else f", data_dir={str(data_dir)!r}"
        raise FileNotFoundError(
            f"{name} is not prepared in {builder.data_dir}. Preparing it needs TensorFlow, once:\n"
            f"  pip install tensorflow-cpu\n"
            f'  python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}{where}, '
            f"file_format='array_record').download_and_prepare()\"\n"
            f"Afterwards it is read without TensorFlow."
        ) from error


def _load_tfds(name: str, split: str, data_dir: str | Path | None) -> tuple[np.ndarray, np.ndarray]:
    """A small set decoded once: x uint8, label."""
    examples = _open_tfds(name, split, data_dir)[1]
    pairs = [(e["image"], e["label"]) for e in map(examples.__getitem__, range(len(examples)))]
    return np.stack([x for x, _ in pairs]), np.asarray([label for _, label in pairs])


def _read_examples(examples: Any, labelled: bool, index: np.ndarray) -> Batch:
    rows = [examples[int(i)] for i in index]
    batch = {"x": _to_unit(np.stack([row["image"] for row in rows]))}
    if labelled:
        batch["label"] = np.asarray([row["label"] for row in rows], np.int32)
    return batch
