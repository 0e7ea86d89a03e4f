"""Snapshots of averages, from which ``posthoc`` makes others (EDM2, Karras et al., 2024, app. C).

Training keeps two power-function averages, of relative widths 0.05 and 0.10, beside the run's own,
and saves them at intervals as ``workdir/snapshots/step_<step>_<sigma_rel>.safetensors``. Values are
stored as float16 where they fit: rounding changes a reconstruction by about 2e-4 of the parameters'
size, no more than the reconstruction's own error from 16 snapshots.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from diffusion import ema, processes
from diffusion.pretrained import files

FOLDER = "snapshots"
SIGMA_RELS = (0.05, 0.10)
_LARGEST = float(np.finfo(np.float16).max)


@dataclass(frozen=True)
class Snapshot:
    """A saved power-function average of relative width ``sigma_rel`` after ``step`` steps."""

    step: int
    sigma_rel: float
    path: Path


def profiles(sigma_rels: Sequence[float] = SIGMA_RELS) -> dict[str, ema.Profile]:
    """The averages that training must keep, for the argument ``emas`` of ``fit``."""
    return {_name(sigma_rel): ema.power_function(sigma_rel) for sigma_rel in sigma_rels}


def writer(
    workdir: str | os.PathLike, every: int, sigma_rels: Sequence[float] = SIGMA_RELS
) -> Callable[[Any, int], None]:
    """The hook of ``fit`` that saves them, every ``every`` steps and after the last step.

    The first call removes snapshots that the run would not have at that step, if it continues from
    an earlier checkpoint or with other settings.
    """
    folder = Path(workdir) / FOLDER
    first = True

    def write(state: Any, step: int) -> None:
        nonlocal first
        trees = {s: processes.local(state.ema[_name(s)]) for s in sigma_rels}
        if jax.process_index() != 0:
            return
        folder.mkdir(exist_ok=True)
        if first:
            before = (step - 1) // every * every
            later = [snapshot.path for snapshot in listed(workdir) if snapshot.step > before]
            for path in [*later, *folder.glob("*.partial")]:
                path.unlink()
            first = False
        for sigma_rel, tree in trees.items():
            _write(folder / f"step_{step:09d}_{sigma_rel:g}.safetensors", tree)

    return write


def listed(workdir: str | os.PathLike) -> list[Snapshot]:
    """The snapshots of a run, by step and width."""
    found = []
    for path in (Path(workdir) / FOLDER).glob("step_*.safetensors"):
        match = re.fullmatch(r"step_(\d{9})_(\d[\d.e-]*)", path.stem, re.ASCII)
        if match:  # what else is there was put there by somebody
            found.append(Snapshot(int(match[1]), float(match[2]), path))
    return sorted(found, key=lambda s: (s.step, s.sigma_rel))


def read(snapshot: Snapshot) -> dict[str, Callable[[], np.ndarray]]:
    """Parameter's name, with "/" between the parts -> a function that reads it."""
    tensors = files.open_file(snapshot.path)
    try:
        checksums = json.loads(files.metadata(snapshot.path)["crc32"])
        whole = set(checksums) == set(tensors)
    except (KeyError, TypeError, ValueError, RecursionError):
        whole = False
    if not whole:
        raise ValueError(
            f"{snapshot.path} is damaged: its checksums are not those of its tensors. Delete the "
            "file: the other snapshots suffice"
        )

    def values(name: str) -> np.ndarray:
        array = tensors[name].read()
        if _checksum(array) != checksums.get(name):
            raise ValueError(
                f"{snapshot.path} is damaged: the checksum of {name} differs. Delete the file: "
                "the other snapshots suffice"
            )
        return array

    return {name: partial(values, name) for name in tensors}


def _write(path: Path, tree: Mapping[str, Any]) -> None:
    arrays = {k: _small(np.asarray(array)) for k, array in flatten_dict(tree, sep="/").items()}
    checksums = {name: _checksum(array) for name, array in arrays.items()}
    tensors = {name: files.of_array(array) for name, array in arrays.items()}
    files.write_file(path, tensors, {"format": "pt", "crc32": json.dumps(checksums)})


def _small(array: np.ndarray) -> np.ndarray:
    fits = array.dtype == np.float32 and np.abs(array).max(initial=0) < _LARGEST
    return array.astype(np.float16) if fits else array


def _checksum(array: np.ndarray) -> str:
    return f"{zlib.crc32(np.ascontiguousarray(array).view(np.uint8)):08x}"


def _name(sigma_rel: float) -> str:
    return f"posthoc_{sigma_rel:g}"
