"""Pictures of what a pipeline draws, by the view of its modality."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion.data.sources import Source
from diffusion.pipelines.conditioners import Subject
from diffusion.pipelines.drawer import Drawer
from diffusion.pipelines.pipeline import Params, Pipeline

FEW = 20
"""Subjects that have a row each; of more, a grid has as many rows as columns."""
LINES = 200
"""Samples of a path that has no rows."""


def grid_size(pipeline: Pipeline, columns: int, subjects: Sequence[Subject] = ()) -> int:
    """Samples of a grid: a row per subject, if they are few."""
    rows = len(subjects or pipeline.conditioner.suggestions)
    return columns * (rows if 0 < rows <= FEW else columns)


def save_grid(
    path: Path,
    pipeline: Pipeline,
    x: np.ndarray,
    subjects: Sequence[Subject],
    columns: int,
    real: Source | None = None,
) -> None:
    """Samples x as the data are, those of a subject side by side, into a PNG."""
    numbers = {subject: i for i, subject in enumerate(dict.fromkeys(subjects))}
    row = np.array([numbers[subject] for subject in subjects])
    order, names = np.argsort(row, kind="stable"), ()
    x, row = x[order], row[order]
    if len(x) % columns == 0 and np.all(row.reshape(-1, columns) == row[::columns, None]):
        names = [pipeline.conditioner.name(list(numbers)[k]) for k in row[::columns]]
        names = names if all(names) else ()
    beside = None if real is None else real.read(np.arange(min(len(x), len(real))))["x"]
    pipeline.view.grid(path, x, columns=columns, row_names=names, real=beside)


def save_trajectory(
    folder: Path,
    drawer: Drawer,
    params: Params,
    subjects: Sequence[Subject],
    negative: Subject | None = None,
    columns: int | None = None,
) -> None:
    """trajectory.png and trajectory.gif of samples on their way from noise."""
    pipeline = drawer.pipeline
    path = drawer.trajectory(params, subjects, negative)
    names = [pipeline.conditioner.name(subject) for subject in subjects]
    names = names if all(names) else ()
    path = pipeline.codec.decode_all(params, path)
    pipeline.view.trajectory(folder, path, row_names=names, columns=columns)
