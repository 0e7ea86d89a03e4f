"""Arrays in ``.npz`` files that are read and written a few rows at a time, never whole."""

from __future__ import annotations

import math
import struct
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusion.data.sources import unreadable
from diffusion.pretrained.files import PICKLES

LOCAL = 30  # bytes of a zip entry's header before its name


@dataclass(frozen=True)
class Member:
    """An array [N, ...] in a file, none of which has been read."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    start: int  # of its values, in the file if they are stored as they are, else in the entry
    stored: bool
    fortran: bool = False  # whether the first axis varies fastest

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def rows(self, first: int, end: int) -> np.ndarray:
        """Rows ``first`` to ``end``, without the last."""
        none = np.empty((0, *self.shape[1:]), self.dtype)
        return next(self.chunks(max(end - first, 1), first, end), none)

    def chunks(self, size: int, first: int = 0, end: int | None = None) -> Iterator[np.ndarray]:
        """All rows in order, ``size`` at a time."""
        last = self.shape[0] if end is None else min(end, self.shape[0])
        if self.fortran:
            x = self.whole()
            yield from (x[row : min(row + size, last)] for row in range(first, last, size))
            return
        with _entry(self.path, self.name, self.stored) as file:
            file.seek(self.start + first * self.row)
            for row in range(first, last, size):
                shape = (min(size, last - row), *self.shape[1:])
                raw = file.read(shape[0] * self.row)
                if len(raw) < shape[0] * self.row:
                    raise ValueError(f"{self.path} is truncated: {self.name} ends at row {row}")
                yield np.frombuffer(raw, self.dtype).reshape(shape)

    def whole(self) -> np.ndarray:
        """The whole array, for small ones."""
        with np.load(self.path) as file:
            return file[self.name]


def read(path: str | Path) -> dict[str, Member]:
    """The arrays of a file by name.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is a pickle, damaged, or holds Python objects.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    if path.suffix in PICKLES:
        raise ValueError(
            f"{path}: {path.suffix} files are read by unpickling, which runs whatever code is in "
            "them. Convert it where you trust it: numpy.savez('FILE.npz', **contents['fid']) for "
            "a dict of mu and sigma under 'fid'"
        )
    try:
        return dict(_members(path))
    except Exception as error:  # zipfile's, struct's, NumPy's
        raise ValueError(f"{path} cannot be read: {unreadable(error)}") from error


def write(path: Path, arrays: Mapping[str, tuple[tuple[int, ...], np.dtype, Iterable]]) -> None:
    """Writes arrays of (shape, dtype, chunks) into a file, complete or not at all."""
    partial = path.with_name(path.name + ".partial")
    try:
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as file:
            for name, (shape, dtype, chunks) in arrays.items():
                with file.open(f"{name}.npy", "w", force_zip64=True) as entry:
                    about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype))}
                    about |= {"fortran_order": False, "shape": tuple(shape)}
                    np.lib.format.write_array_header_1_0(entry, about)
                    for chunk in chunks:
                        entry.write(np.ascontiguousarray(chunk, dtype).tobytes())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def check_bytes(pictures: Member) -> None:
    """Raises ValueError for uint8 that hold floats cut to whole numbers."""
    first = pictures.rows(0, 100)
    if first.size and first.max() <= 1:
        raise ValueError(
            f"{pictures.path}: {pictures.name} is uint8, but its largest value is {first.max()}: "
            "were floats cut to whole numbers? Expected 0..255"
        )


def _members(path: Path) -> Iterator[tuple[str, Member]]:
    with zipfile.ZipFile(path) as file:
        if file.testzip():  # later only parts are read, which no checksum covers
            raise ValueError("a wrong checksum")
        for info in file.infolist():
            with file.open(info) as entry:
                version = np.lib.format.read_magic(entry)
                header = np.lib.format.read_array_header_1_0
                header = header if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = header(entry)
                start = entry.tell()
            if dtype.hasobject:
                raise ValueError("Object arrays")
            if start + math.prod(shape) * dtype.itemsize != info.file_size:
                raise ValueError("a header of another size")
            stored = info.compress_type == zipfile.ZIP_STORED
            if stored:
                with path.open("rb") as raw:
                    raw.seek(info.header_offset)
                    name, extra = struct.unpack("<HH", raw.read(LOCAL)[26:30])
                start += info.header_offset + LOCAL + name + extra
            name = info.filename.removesuffix(".npy")
            yield name, Member(path, name, shape, dtype, start, stored, fortran and len(shape) > 1)


def _entry(path: Path, name: str, stored: bool):
    """A file to read a member's bytes from."""
    return path.open("rb") if stored else zipfile.ZipFile(path).open(f"{name}.npy")
