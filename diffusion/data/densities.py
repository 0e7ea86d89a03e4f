"""Two-dimensional toy densities: small enough to see everything a model does.

Every density lies in about [-1, 1]^2 and has a standard deviation of about 0.5 per coordinate,
like images do, so that schedules and sigma_data need no change between the two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def two_moons(n: int, rng: np.random.Generator) -> np.ndarray:
    """Two interleaved half circles with Gaussian noise; [n, 2]."""
    angle = np.pi * rng.random(n)
    upper = rng.random(n) < 0.5
    x = np.where(upper, np.cos(angle), 1 - np.cos(angle)) - 0.5
    y = np.where(upper, np.sin(angle), 0.5 - np.sin(angle)) - 0.25
    return 0.6 * (np.stack([x, y], -1) + 0.06 * rng.standard_normal((n, 2)))


def swiss_roll(n: int, rng: np.random.Generator) -> np.ndarray:
    """A spiral of one and a half turns, uniform in angle, with Gaussian noise; [n, 2]."""
    angle = 1.5 * np.pi * (1 + 2 * rng.random(n))
    spiral = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
    return (spiral + 0.3 * rng.standard_normal((n, 2))) / 15


def checkerboard(n: int, rng: np.random.Generator) -> np.ndarray:
    """Uniform on the 8 dark squares of a 4 x 4 board on [-1, 1]^2; [n, 2]."""
    column = rng.integers(0, 4, n)
    row = 2 * rng.integers(0, 2, n) + column % 2
    corner = np.stack([column, row], -1)
    return (corner + rng.random((n, 2))) / 2 - 1


def eight_gaussians(n: int, rng: np.random.Generator) -> np.ndarray:
    """Eight Gaussians (standard deviation 0.05) on the circle of radius 0.75; [n, 2]."""
    angle = 2 * np.pi * rng.integers(0, 8, n) / 8
    centre = 0.75 * np.stack([np.cos(angle), np.sin(angle)], -1)
    return centre + 0.05 * rng.standard_normal((n, 2))


def pinwheel(n: int, rng: np.random.Generator) -> np.ndarray:
    """Five bent arms (Johnson et al., 2016), Gaussian along and across; [n, 2]."""
    along = 1 + 0.3 * rng.standard_normal(n)
    across = 0.06 * rng.standard_normal(n)
    angle = 2 * np.pi * rng.integers(0, 5, n) / 5 + 0.25 * np.exp(along)
    cos, sin = np.cos(angle), np.sin(angle)
    return 0.6 * np.stack([cos * along - sin * across, sin * along + cos * across], -1)


DENSITIES: dict[str, Callable[[int, np.random.Generator], np.ndarray]] = {
    f.__name__: f for f in (two_moons, swiss_roll, checkerboard, eight_gaussians, pinwheel)
}


def sample(name: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` points of the density called ``name``; [n, 2] float32.

    Raises:
      ValueError: unknown name.
    """
    if name not in DENSITIES:
        raise ValueError(f"unknown density {name!r}, choose one of {', '.join(DENSITIES)}")
    return DENSITIES[name](n, rng).astype(np.float32)
