"""Kernel inception distance (Binkowski et al., 2018): a polynomial kernel's mean discrepancy."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from diffusion.errors import check_range
from diffusion.evaluation.intervals import Z95
from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.networks.network import Network

SEED = 2020  # torch-fidelity's, so that subsets are the same


class Distance(NamedTuple):
    """Mean over subsets, its standard deviation over them, its standard error, subsets' size."""

    mean: float
    std: float
    error: float
    size: int


def kid(samples: np.ndarray, real: np.ndarray, *, subsets: int = 100, size: int = 1000) -> Distance:
    """Mean over random subsets of MMD^2 with k(x, y) = (x.y / D + 1)^3, without bias.

    MMD^2 = mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j), which
    may be negative. In float64: products of features far from 0 cancel. Subsets are those of
    torch-fidelity.

    The standard error is that of other samples of the same distribution, and of other subsets. By
    Hoeffding's decomposition, with Z1 the variance of h(x) = 2 mean_x' k(x, x') - 2 mean_y k(x, y)
    and Z2 those of what the kernels' row and column means leave,

        error^2 = std^2 / (subsets - 1) + Z1 / N + 2 Z2(x, x') / (N (N - 1)) + 4 Z2(x, y) / (N M).

    Z1 is at least 0, which makes the error of some dozens of samples up to a quarter too large
    where the two distributions are the same.

    Args:
      samples, real: features [N, D] and [M, D].
      subsets: how many.
      size: members of one; as many as the smaller set has, if it has fewer.

    Raises:
      ValueError: there are fewer than two examples, or features differ in size.
    """
    n, m = len(samples), len(real)
    check_range("the number of examples", min(n, m), 2)
    x, y = (np.asarray(a).reshape(len(a), -1) for a in (samples, real))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features differ in size: {x.shape[1]} and {y.shape[1]}")
    size = min(size, n, m)
    rng = np.random.RandomState(SEED)
    found, spreads = np.empty(subsets), np.empty((subsets, 3))
    for i in range(subsets):
        a = x[rng.choice(n, size, replace=False)].astype(np.float64)
        b = y[rng.choice(m, size, replace=False)].astype(np.float64)
        found[i], spreads[i] = _mmd(_kernel(a, a), _kernel(b, b), _kernel(a, b))
    std = float(found.std())
    first, second, cross = spreads.mean(0)
    variance = max(first, 0) / n + 2 * second / (n * (n - 1)) + 4 * cross / (n * m)
    error = float(np.sqrt(std**2 / max(subsets - 1, 1) + variance))
    return Distance(float(found.mean()), std, error, size)


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def _mmd(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> tuple[float, tuple[float, ...]]:
    """MMD^2 of the kernel's values [S, S], without bias, and Z1, Z2(x, x'), Z2(x, y)."""
    size = len(xx)
    pairs = size * (size - 1)
    np.fill_diagonal(xx, 0)
    within, across = xx.sum(1) / (size - 1), xy.mean(1)
    real = (yy.sum() - np.trace(yy)) / pairs
    figure = within.mean() + real - 2 * across.mean()
    rest = xx - within[:, None] - within[None] + within.mean()
    np.fill_diagonal(rest, 0)
    second = (rest**2).sum() / pairs
    cross = (xy - across[:, None] - xy.mean(0)[None] + across.mean()).var()
    # Means over a subset's few partners scatter besides.
    first = 4 * ((within - across).var(ddof=1) - second / (size - 1) - cross / size)
    return figure, (first, second, cross)


def metric(
    features: Network | None = None, reference: str = "", subsets: int = 100, size: int = 1000
) -> Metric:
    """``kid``: kid_NETWORK, with the published ± over subsets, kid_NETWORK_std.

    "_ci" is of the samples' sampling error, which differs from the spread over subsets.
    """
    check_range("subsets", subsets, 1, 10_000)
    check_range("size", size, 2, 10_000)

    def measure(judged: Judged) -> dict[str, Any]:
        real, name = judged.real(reference), judged.name("kid")
        found = kid(judged.samples.array(), real.array(), subsets=subsets, size=size)
        figures: dict[str, Any] = {name: found.mean, f"{name}_std": found.std}
        figures[judged.name("kid_ci")] = Z95 * found.error
        if found.size < size:
            figures[f"{name}_note"] = (
                f"{name} is of subsets of {found.size:,} members, because there are no more "
                f"examples; {size:,} are usual"
            )
        return figures

    return Metric(measure, network=features, references=(reference,))
