"""Features of samples, shard by shard: in memory, or in files so that a judgement can go on."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

import numpy as np

from diffusion.data.sources import read_npz

SAMPLES = "samples"
SHAPE = "shape"
LOCK, KEPT = "lock", "kept"
Arrays = dict[str, np.ndarray]


class Shards:
    """Arrays by name and number: shard k holds examples k * size and following.

    In a folder each is a file, written whole or not at all, so that a stopped process loses no more
    than one shard, and several processes can fill one folder.
    """

    def __init__(self, size: int, folder: Path | None = None):
        self.size, self.folder = size, folder
        self._held: dict[tuple[str, int], Arrays] = {}

    def rows(self, name: str, number: int) -> int:
        """How many examples a shard holds; 0 if it is not there."""
        try:
            arrays = self.read(name, number)
        except (FileNotFoundError, KeyError):
            return 0
        except ValueError:  # damaged: it is made again
            self._path(name, number).unlink()
            return 0
        return len(next(iter(arrays.values())))

    def read(self, name: str, number: int) -> Arrays:
        """The arrays of a shard."""
        if self.folder is None:
            return self._held[name, number]
        return read_npz(self._path(name, number))

    def write(self, name: str, number: int, arrays: Arrays) -> None:
        """Keeps a shard, in place of what was there."""
        if self.folder is None:
            self._held[name, number] = arrays
            return
        path = self._path(name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            with partial.open("wb") as file:
                np.savez(file, **arrays)
            partial.replace(path)
        except OSError as error:  # a full disk
            raise OSError(error.errno, error.strerror or str(error), str(path)) from error
        finally:
            partial.unlink(missing_ok=True)

    def chunks(self, name: str, array: str, count: int) -> Iterator[np.ndarray]:
        """An array of the first ``count`` examples, shard by shard."""
        for number, first in enumerate(range(0, count, self.size)):
            yield self.read(name, number)[array][: count - first]

    def missing(self, name: str, count: int) -> list[int]:
        """The shards that the first ``count`` examples lack."""
        starts = enumerate(range(0, count, self.size))
        return [k for k, first in starts if self.rows(name, k) < min(self.size, count - first)]

    @contextmanager
    def used(self, keep: bool = False) -> Iterator[None]:
        """No process removes the shards until the block ends; afterwards neither if ``keep``."""
        if self.folder is None:
            yield
            return
        with self._shared():
            if keep:
                (self.folder / KEPT).touch()
            yield

    def _shared(self) -> IO:
        """The lock's file, of a folder that no other process removed meanwhile."""
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                file = (self.folder / LOCK).open("a")
                fcntl.flock(file, fcntl.LOCK_SH)  # waits for one that removes
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(file.fileno()), (self.folder / LOCK).stat()):
                        return file
                file.close()

    def remove(self) -> None:
        """Deletes all shards, unless they are kept, or others use them and will remove them."""
        self._held.clear()
        if self.folder is None or (self.folder / KEPT).exists():
            return
        with suppress(FileNotFoundError, BlockingIOError), (self.folder / LOCK).open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # others are in use
                self.folder.parent.rmdir()

    def _path(self, name: str, number: int) -> Path:
        return self.folder / name / f"{number:05d}.npz"
