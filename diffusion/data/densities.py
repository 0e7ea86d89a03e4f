"""Two-dimensional toy densities: small enough to see everything a model does.

Every density lies in about [-1, 1]^2 and has a standard deviation of about 0.5 per coordinate,
like images do, so that schedules and sigma_data need no change between the two.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy.special import logsumexp


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


def log_density(name: str, x: np.ndarray) -> np.ndarray | None:
    """log p [N] of points [N, 2] in nats; None for the pinwheel, which has no simple one.

    Curves with Gaussian noise are integrated over their angle at 2,000 midpoints, whose distance
    is a small part of the noise: the result is exact but for rounding.
    """
    x = np.asarray(x, np.float64)
    middle = (np.arange(2000) + 0.5) / 2000
    if name == "checkerboard":
        column, row = np.floor((x.T + 1) * 2)
        inside = (np.abs(x) <= 1).all(1) & ((column - row) % 2 == 0)
        return np.where(inside, -np.log(2.0), -np.inf)
    if name == "eight_gaussians":
        angle = 2 * np.pi * np.arange(8) / 8
        return _log_mixture(x, 0.75 * np.stack([np.cos(angle), np.sin(angle)], -1), 0.05)
    if name == "swiss_roll":
        angle = 1.5 * np.pi * (1 + 2 * middle)
        curve = angle[:, None] * np.stack([np.cos(angle), np.sin(angle)], -1)
        return _log_mixture(x, curve / 15, 0.3 / 15)
    if name == "two_moons":
        cos, sin = np.cos(np.pi * middle), np.sin(np.pi * middle)
        upper, lower = np.stack([cos, sin], -1), np.stack([1 - cos, 0.5 - sin], -1)
        return _log_mixture(x, 0.6 * (np.concatenate([upper, lower]) - [0.5, 0.25]), 0.036)
    return None


def _log_mixture(x: np.ndarray, centres: np.ndarray, std: float) -> np.ndarray:
    """log of the mean of N(centre, std^2 I), [N]."""
    constant = np.log(2 * np.pi * std**2 * len(centres))
    parts = []
    for part in np.array_split(x, -(-len(x) // 1000)):
        square = ((part[:, None] - centres) ** 2).sum(-1)
        parts.append(logsumexp(-0.5 * square / std**2, axis=1) - constant)
    return np.concatenate(parts)


def sample(name: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """``n`` points of the density called ``name``; [n, 2] float32."""
    if name not in DENSITIES:
        raise ValueError(f"unknown density {name!r}, choose one of {', '.join(DENSITIES)}")
    return DENSITIES[name](n, rng).astype(np.float32)
