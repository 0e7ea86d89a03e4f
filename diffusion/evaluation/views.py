"""Views: how the examples of a modality are shown and saved.

A source names its view (``Source.view``), and a pipeline carries it, so that nothing else asks how
many axes an example has. A new modality adds a class with these methods and its name in ``VIEWS``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from diffusion.evaluation import figures
from diffusion.evaluation.figures import BLUE


class View(Protocol):
    """What is asked of a modality; x are examples [N, ...] as the data have them.

    Attributes:
      metrics: specs of metrics that need nothing but the data.
    """

    metrics: tuple[str, ...]

    def show(self, x: np.ndarray) -> np.ndarray:
        """x as it can be seen: what ``grid``, ``save`` and a contact sheet show."""

    def grid(
        self,
        path: Path,
        x: np.ndarray,
        *,
        columns: int = 10,
        row_names: Sequence[str] = (),
        real: np.ndarray | None = None,
    ) -> None:
        """One PNG of all examples, beside ``real`` ones where the modality compares."""

    def trajectory(
        self,
        folder: Path,
        path: np.ndarray,
        *,
        row_names: Sequence[str] = (),
        columns: int | None = None,
    ) -> None:
        """trajectory.png and trajectory.gif of a sampler's path [S, N, ...], from noise to data."""

    def save(self, folder: Path, x: np.ndarray, texts: Sequence[Mapping[str, str]]) -> None:
        """A file per example, numbered from 0, with its settings; nothing where numbers do."""

    def thumbnails(self, examples: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures of single examples, of any size; none where only a diagram shows anything."""

    def diagram(self, x: np.ndarray) -> figures.Plot:
        """All examples in one diagram, where there are no thumbnails."""


class Images:
    """Images [N, H, W, C] in [-1, 1]. Of other channels than 1 or 3 (latents), the first three."""

    metrics = ()

    def show(self, x: np.ndarray) -> np.ndarray:
        if x.shape[-1] in (1, 3):
            return x
        return (x[..., :3] / np.abs(x).max()).clip(-1, 1)

    def grid(
        self,
        path: Path,
        x: np.ndarray,
        *,
        columns: int = 10,
        row_names: Sequence[str] = (),
        real: np.ndarray | None = None,
    ) -> None:
        figures.save_png(path, figures.image_grid(self.show(x), columns, row_names=row_names))

    def trajectory(
        self,
        folder: Path,
        path: np.ndarray,
        *,
        row_names: Sequence[str] = (),
        columns: int | None = None,
    ) -> None:
        path = self.show(path)
        figures.trajectory_strip(folder / "trajectory.png", path, row_names=row_names)
        figures.trajectory_gif(folder / "trajectory.gif", path, columns=columns or path.shape[1])

    def save(self, folder: Path, x: np.ndarray, texts: Sequence[Mapping[str, str]]) -> None:
        for i, (image, text) in enumerate(zip(self.show(x), texts)):
            figures.save_png(folder / f"{i:06d}.png", figures.to_uint8(image), text)

    def thumbnails(self, examples: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [self.show(x) for x in examples]

    def diagram(self, x: np.ndarray) -> figures.Plot:
        """Not needed: there are thumbnails."""
        raise ValueError("images are shown by thumbnails")


class Points:
    """Points [N, 2] in the plane, shown as densities."""

    metrics = ("wasserstein()", "energy()")

    def show(self, x: np.ndarray) -> np.ndarray:
        return x

    def grid(
        self,
        path: Path,
        x: np.ndarray,
        *,
        columns: int = 10,
        row_names: Sequence[str] = (),
        real: np.ndarray | None = None,
    ) -> None:
        figures.density_figure(path, x, real)

    def trajectory(
        self,
        folder: Path,
        path: np.ndarray,
        *,
        row_names: Sequence[str] = (),
        columns: int | None = None,
    ) -> None:
        figures.path_figure(folder / "trajectory.png", path)
        limit = 1.5 * np.abs(path[-1]).max()
        edges = np.linspace(-limit, limit, 65)
        counts = [np.histogram2d(-x[:, 1], x[:, 0], bins=(edges, edges))[0] for x in path]
        shade = 1 - 2 * np.minimum(np.array(counts) / max(np.quantile(counts[-1], 0.99), 1), 1)
        figures.trajectory_gif(folder / "trajectory.gif", shade[:, None, :, :, None], scale=4)

    def save(self, folder: Path, x: np.ndarray, texts: Sequence[Mapping[str, str]]) -> None:
        """Nothing: points are numbers, which samples.npz holds."""

    def thumbnails(self, examples: Sequence[np.ndarray]) -> list[np.ndarray]:
        return []

    def diagram(self, x: np.ndarray) -> figures.Plot:
        return lambda axes: axes.scatter(*x[:5000].T, s=1, color=BLUE)


VIEWS: dict[str, View] = {"images": Images(), "points": Points()}
