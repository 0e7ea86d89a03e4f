"""Pictures of what a run's model draws."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion.config import latents
from diffusion.evaluation import figures
from diffusion.modes.drawer import Drawer, visible


def grid_size(drawer: Drawer) -> int:
    """A row per class or caption, if they are few."""
    columns = drawer.experiment.config.samples.columns
    rows = drawer.experiment.num_classes or len(drawer.captions)
    return columns * (rows if 0 < rows <= 20 else columns)


def grid(drawer: Drawer, drawn: tuple[np.ndarray, np.ndarray | None]) -> np.ndarray:
    """One row per class, or as many rows as it takes."""
    x, label = drawn
    names = ()
    columns = drawer.experiment.config.samples.columns
    if label is not None:
        order = np.argsort(label, kind="stable")
        x, label = x[order], label[order]
        rows = label[::columns]
        if len(x) % columns == 0 and np.all(label.reshape(-1, columns) == rows[:, None]):
            names = [name(drawer, row) for row in rows]
    return figures.image_grid(drawer.visible(x), columns, row_names=names)


def name(drawer: Drawer, label: int) -> str:
    """The caption or the class of that number."""
    names = drawer.captions or drawer.experiment.train.class_names
    return names[label] if names else str(label)


def preview(config: ConfigDict, folder: Path, batch: int, evaluation: int, x0: np.ndarray) -> None:
    """x_0_hat of a batch's first samples, after so many evaluations."""
    folder.mkdir(exist_ok=True)
    path = folder / f"preview_{batch:03d}_{evaluation:04d}.png"
    columns = config.samples.columns
    autoencoder = latents.autoencoder(config.data)
    shown = visible(x0[: columns**2], autoencoder)
    figures.save_png(path, figures.image_grid(shown, columns))


def finish(drawer: Drawer, params: Any, folder: Path) -> None:
    """What training leaves: loss.png, samples.png and trajectories, or density.png of points."""
    experiment = drawer.experiment
    figures.loss_curve(
        folder / "loss.png", folder / "metrics.jsonl", title=f"{experiment.train.name}: loss"
    )
    if len(experiment.train.shape) == 1:
        x, _ = drawer.draw(params, experiment.config.samples.count)
        path, _ = drawer.trajectory(params, 200)
        real = experiment.held_out.all()["x"][: len(x)]
        figures.density_figure(folder / "density.png", real, x, path)
        return
    drawn = drawer.draw(params, grid_size(drawer))
    figures.save_png(folder / "samples.png", grid(drawer, drawn))
    rows = min(10, experiment.num_classes or len(drawer.captions) or 10)
    path, label = drawer.trajectory(params, rows)
    names = [] if label is None else [name(drawer, k) for k in label]
    figures.trajectory_strip(folder / "trajectory.png", drawer.visible(path), row_names=names)
    figures.trajectory_gif(folder / "trajectory.gif", drawer.visible(path), columns=path.shape[1])
