"""Arrays computed once, batch by batch, and then read from disk: latents, text embeddings.

A table is a folder of ``NAME.npy``, whose rows belong together, and ``about.json``, which describes
what they were computed from. The folder appears when it is complete; until then it is called
``FOLDER.partial``, and a later call continues there.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib.format import open_memmap
from tqdm import tqdm

Table = dict[str, np.ndarray]  # mapped into memory, each [N, ...]
Compute = Callable[[np.ndarray], Mapping[str, np.ndarray]]  # indices [B] -> rows, each [B, ...]

ABOUT = "about.json"
PROGRESS = "progress.json"


def compute(
    folder: str | Path,
    count: int,
    rows: Compute,
    about: Mapping[str, Any],
    *,
    batch_size: int = 64,
    progress: bool = True,
) -> Table:
    """The table of ``count`` rows in ``folder``, computed now unless it is there.

    ``rows`` is always called with ``batch_size`` indices; the last batch repeats indices. ``about``
    holds JSON values that describe what the rows are computed from; a table that was computed from
    something else is refused.
    """
    folder = Path(folder)
    about = json.loads(json.dumps({**about, "count": count}))
    if folder.exists():
        return read(folder, about)
    partial = folder.with_name(folder.name + ".partial")
    done = _done(partial, about)
    if not done:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write_json(partial / ABOUT, about)
    arrays = _open(partial, "r+") if done else {}
    with tqdm(total=count, initial=done, desc=folder.name, disable=not progress) as bar:
        for start in range(done, count, batch_size):
            index = np.minimum(np.arange(start, start + batch_size), count - 1)
            stop = min(start + batch_size, count)
            for name, values in rows(index).items():
                values = np.asarray(values)[: stop - start]
                if name not in arrays:
                    path, shape = partial / f"{name}.npy", (count, *values.shape[1:])
                    arrays[name] = open_memmap(path, "w+", values.dtype, shape)
                arrays[name][start:stop] = values
            for array in arrays.values():
                array.flush()
            _write_json(partial / PROGRESS, {"done": stop})
            bar.update(stop - start)
    del arrays
    (partial / PROGRESS).unlink(missing_ok=True)
    os.rename(partial, folder)
    return read(folder, about)


def read(folder: str | Path, about: Mapping[str, Any]) -> Table:
    """The table in ``folder``; ValueError if it was computed from something else than ``about``."""
    folder = Path(folder)
    if not (folder / ABOUT).exists():
        raise FileNotFoundError(f"nothing is cached in {folder}")
    there, here = json.loads((folder / ABOUT).read_text()), json.loads(json.dumps(about))
    different = [
        f"{name}: {there.get(name)!r} there, {here.get(name)!r} here"
        for name in sorted({*there, *here})
        if there.get(name) != here.get(name)
    ]
    if different:
        raise ValueError(
            f"{folder} was computed from something else ({'; '.join(different)}); choose another "
            "folder, or delete it"
        )
    return _open(folder, "r")


def _done(partial: Path, about: Mapping[str, Any]) -> int:
    """The number of rows that an interrupted call has finished; 0 if they are of something else."""
    try:
        same = json.loads((partial / ABOUT).read_text()) == about
        return json.loads((partial / PROGRESS).read_text())["done"] if same else 0
    except FileNotFoundError:
        return 0


def _open(folder: Path, mode: str) -> Table:
    return {path.stem: np.load(path, mmap_mode=mode) for path in sorted(folder.glob("*.npy"))}


def _write_json(path: Path, value: Any) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, path)
