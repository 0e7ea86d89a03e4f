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

Array = np.ndarray
Names = Sequence[str]
Texts = Sequence[Mapping[str, str]]
Real = Array | None


class View(Protocol):
    """What is asked of a modality; x are examples [N, ...] as the data have them.

    Attributes:
      metrics: specs of metrics that need nothing but the data.
    """

    metrics: tuple[str, ...] = ()

    def show(self, x: Array) -> Array:
        """x as it can be seen: what ``grid``, ``save`` and a contact sheet show."""
        return x

    def grid(
        self, path: Path, x: Array, *, columns: int = 10, row_names: Names = (), real: Real = None
    ) -> None:
        """One PNG of all examples, beside ``real`` ones where the modality compares."""

    def trajectory(
        self, folder: Path, path: Array, *, row_names: Names = (), columns: int | None = None
    ) -> None:
        """trajectory.png and trajectory.gif of a sampler's path [S, N, ...], from noise to data."""

    def save(self, folder: Path, x: Array, texts: Texts) -> None:
        """A folder of a file per example, numbered from 0, with its settings; nothing where numbers
        do."""

    def thumbnails(self, examples: Sequence[Array]) -> list[Array]:
        """Pictures of single examples, of any size; none where only a diagram shows anything."""
        return []

    def diagram(self, x: Array) -> figures.Plot:
        """All examples in one diagram, where there are no thumbnails."""


class Images(View):
    """Images [N, H, W, C] in [-1, 1]. Of other channels than 1 or 3 (latents), the first three."""

    def show(self, x: Array) -> Array:
        if x.shape[-1] in (1, 3):
            return x
        return (x[..., :3] / np.abs(x).max()).clip(-1, 1)

    def grid(
        self, path: Path, x: Array, *, columns: int = 10, row_names: Names = (), real: Real = None
    ) -> None:
        figures.save_png(path, figures.image_grid(self.show(x), columns, row_names=row_names))

    def trajectory(
        self, folder: Path, path: Array, *, row_names: Names = (), columns: int | None = None
    ) -> None:
        path = self.show(path)
        figures.trajectory_strip(folder / "trajectory.png", path, row_names=row_names)
        figures.trajectory_gif(folder / "trajectory.gif", path, columns=columns or path.shape[1])

    def save(self, folder: Path, x: Array, texts: Texts) -> None:
        folder.mkdir(exist_ok=True)
        for i, (image, text) in enumerate(zip(self.show(x), texts)):
            figures.save_png(folder / f"{i:06d}.png", figures.to_uint8(image), text)

    def thumbnails(self, examples: Sequence[Array]) -> list[Array]:
        return [self.show(x) for x in examples]


class Points(View):
    """Points [N, 2] in the plane, shown as densities; samples.npz holds their numbers."""

    metrics = ("wasserstein()", "energy()")

    def grid(
        self, path: Path, x: Array, *, columns: int = 10, row_names: Names = (), real: Real = None
    ) -> None:
        figures.density_figure(path, x, real)

    def trajectory(
        self, folder: Path, path: Array, *, row_names: Names = (), columns: int | None = None
    ) -> None:
        figures.path_figure(folder / "trajectory.png", path)
        limit = 1.5 * np.abs(path[-1]).max()
        edges = np.linspace(-limit, limit, 65)
        counts = [np.histogram2d(-x[:, 1], x[:, 0], bins=(edges, edges))[0] for x in path]
        shade = 1 - 2 * np.minimum(np.array(counts) / max(np.quantile(counts[-1], 0.99), 1), 1)
        figures.trajectory_gif(folder / "trajectory.gif", shade[:, None, :, :, None], scale=4)

    def diagram(self, x: Array) -> figures.Plot:
        return lambda axes: axes.scatter(*x[:5000].T, s=1, color=BLUE)


VIEWS: dict[str, View] = {"images": Images(), "points": Points()}
