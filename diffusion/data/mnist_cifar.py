"""MNIST and CIFAR-10 by name: from their original files, or from TFDS's prepared ones.

Files that are not found are downloaded. TensorFlow is not needed.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import http.client
import io
import itertools
import os
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from diffusion.data import tfds
from diffusion.data.sources import Source, check_split, from_arrays

CACHE = Path("~", ".cache", "diffusion-jax", "data")
"""Where downloads go, if no folder is given."""

MNIST = "https://storage.googleapis.com/cvdf-datasets/mnist/"
MNIST_FILES = {  # and their SHA-256
    f"{name}-ubyte.gz": digest
    for name, digest in (
        ("train-images-idx3", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        ("train-labels-idx1", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        ("t10k-images-idx3", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        ("t10k-labels-idx1", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    )
}
CIFAR10 = "https://www.cs.toronto.edu/~kriz/"
CIFAR10_FILES = {
    "cifar-10-binary.tar.gz": "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd"
}
CIFAR10_NAMES = ("airplane", "automobile", "bird", "cat", "deer")
CIFAR10_NAMES += ("dog", "frog", "horse", "ship", "truck")


def mnist(split: str, data_dir: str | Path | None = None, *, padding: int = 0) -> Source:
    """MNIST: [28, 28, 1], ten classes, 60,000 ``train`` and 10,000 ``test`` examples.

    ``padding`` adds black pixels on each side. ``data_dir`` is a folder with the original
    ``*-ubyte.gz`` files, or TFDS's folder with MNIST prepared in it. If it has neither, the files
    are downloaded into it. None stands for TFDS's own folder, then ``CACHE``.
    """
    check_split(split, "mnist")
    prefix = "train" if split == "train" else "t10k"
    files = [f"{prefix}-images-idx3-ubyte.gz", f"{prefix}-labels-idx1-ubyte.gz"]
    folder = _folder(data_dir, "mnist")
    x, label = _prepared("mnist", split, data_dir, folder / files[0])
    if x is None:
        x, label = (_read_idx(download(MNIST, f, MNIST_FILES, folder)) for f in files)
        x = x[..., None]
    x = np.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    return from_arrays("mnist", x, label, class_names=tuple("0123456789"))


def cifar10(split: str, data_dir: str | Path | None = None) -> Source:
    """CIFAR-10: [32, 32, 3], ten classes, 50,000 ``train`` and 10,000 ``test`` examples.

    ``data_dir`` is as for ``mnist``, with the original ``cifar-10-binary.tar.gz``. Or it has
    ``cifar10_jpegq75.npz``, a copy compressed as JPEG at quality 75 (arrays ``train_jpeg``,
    ``train_offsets``, ``train_labels``, ``test_*``, ``classes``), which is lossy, about 30 dB; the
    source's ``note`` says so.
    """
    check_split(split, "cifar10")
    folder = _folder(data_dir, "cifar10")
    if (path := folder / "cifar10_jpegq75.npz").exists():
        return _cifar10_jpeg(path, split)
    (name,) = CIFAR10_FILES
    x, label = _prepared("cifar10", split, data_dir, folder / name)
    if x is None:
        x, label = _read_cifar10(download(CIFAR10, name, CIFAR10_FILES, folder), split)
    return from_arrays("cifar10", x, label, class_names=CIFAR10_NAMES)


def download(base: str, name: str, sums: Mapping[str, str], folder: Path) -> Path:
    """The file ``name`` in ``folder``, downloaded from the URL ``base + name`` unless it is there.

    ``sums`` holds the SHA-256 of this file and of those that belong to it. If it cannot be
    downloaded, the error explains how to fetch all of them by other means.
    """
    path = folder / name
    if path.exists():
        return path
    partial = path.with_name(f"{name}.{os.getpid()}.partial")
    digest, hidden = hashlib.sha256(), not sys.stderr.isatty()
    try:
        with urllib.request.urlopen(base + name, timeout=30) as response:
            folder.mkdir(parents=True, exist_ok=True)
            total = int(response.headers.get("Content-Length") or 0) or None
            bar = tqdm(total=total, unit="B", unit_scale=True, desc=name, disable=hidden)
            with partial.open("wb") as file, bar:
                while block := response.read(1 << 20):
                    digest.update(block)
                    file.write(block)
                    bar.update(len(block))
        if digest.hexdigest() != sums[name]:
            raise ValueError(
                f"{base}{name} has other contents than expected (SHA-256 {digest.hexdigest()}, "
                f"not {sums[name]})"
            )
        os.replace(partial, path)
    except (OSError, http.client.HTTPException) as error:
        urls = [base + other for other in sums if not (folder / other).exists()]
        raise FileNotFoundError(
            f"{path} is absent and cannot be downloaded ({error}). Where there is a network, run\n"
            + "".join(f"  curl -LO {url}\n" for url in urls)
            + f"and put the files into {folder}; or name the folder that has them, or TFDS's "
            "folder with the set prepared in it: --config.data.dir=DIR"
        ) from error
    finally:
        partial.unlink(missing_ok=True)
    return path


def _folder(data_dir: str | Path | None, name: str) -> Path:
    return Path(data_dir) if data_dir else CACHE.expanduser() / name


def _prepared(
    name: str, split: str, data_dir: str | Path | None, original: Path
) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """A set that TFDS has prepared, decoded; (None, None) if it has not, or has the original."""
    if original.exists():
        return None, None
    try:
        source = tfds.source(name, split, data_dir)
    except tfds.NotPreparedError:
        return None, None
    images = (source.pictures.get(i) for i in range(len(source)))
    x = np.stack([_decode(image) if isinstance(image, bytes) else image for image in images])
    return x, source.pictures.columns["label"][np.arange(len(source))]


def _decode(data: bytes) -> np.ndarray:
    image = np.asarray(Image.open(io.BytesIO(data)))
    return image if image.ndim == 3 else image[..., None]


def _read_idx(path: Path) -> np.ndarray:
    """The idx format of MNIST: 2 zero bytes, type 8 (uint8), rank, big-endian sizes, data."""
    try:
        raw = gzip.decompress(path.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or fetch it again") from error
    if raw[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of bytes")
    rank = raw[3]
    shape = np.frombuffer(raw, ">i4", rank, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * rank).reshape(shape)


def _read_cifar10(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Records of a label and 3 x 32 x 32 bytes, in five files for train and one for test."""
    names = [f"data_batch_{k}.bin" for k in range(1, 6)] if split == "train" else ["test_batch.bin"]
    try:
        with tarfile.open(path) as archive:
            parts = [archive.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names]
        rows = np.frombuffer(b"".join(parts), np.uint8).reshape(-1, 1 + 3 * 32 * 32)
    except (OSError, EOFError, KeyError, ValueError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete it, or fetch it again") from error
    x = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(x), rows[:, 0]


def _cifar10_jpeg(path: Path, split: str) -> Source:
    with np.load(path) as file:
        data, offsets = file[f"{split}_jpeg"], file[f"{split}_offsets"]
        label = file[f"{split}_labels"]
        names = tuple(str(c) for c in file["classes"])
    images = [_decode(data[a:b].tobytes()) for a, b in itertools.pairwise(offsets)]
    note = "CIFAR-10 from a lossy copy (JPEG, quality 75, about 30 dB)"
    made = from_arrays("cifar10", np.stack(images), label, class_names=names)
    return dataclasses.replace(made, note=note)
