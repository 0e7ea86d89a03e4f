"""Solvers that go back up: RePaint's resampling, Restart, and any path of noise levels.

A step up is the forward process, x' = (a'/a) x + sqrt(s'^2 - (a' s / a)^2) z. It needs no
evaluation and is composed with the row before it. After new noise the sampler can correct errors of
earlier steps, at the price of the additional steps down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from diffusion import specs
from diffusion.levels import NoiseLevel
from diffusion.sampling import grids
from diffusion.sampling.tables import Solver, nodes
from diffusion.schedules import Schedule


def jumps(path: NoiseLevel, base: Callable[[NoiseLevel], Solver]) -> Solver:
    """Follows a path of levels: down by ``base``, up by the forward process.

    The path, leaves [M], is a grid whose sigma / alpha may also rise, but not at its ends;
    consecutive rises are one jump. ``base`` takes each descent as a grid of its own: multistep
    methods start anew after a jump. Bounds of learned variances are those of step and jump.
    """
    path = NoiseLevel(*(np.asarray(leaf, np.float64) for leaf in path))
    rises = path.sigma[1:] * path.alpha[:-1] > path.sigma[:-1] * path.alpha[1:]
    parts = np.split(np.arange(len(path.sigma)), np.flatnonzero(rises) + 1)
    if len(parts[0]) < 2 or len(parts[-1]) < 2:
        raise ValueError("a path of noise levels must begin and end with a step down")
    descents = [NoiseLevel(*(leaf[part] for leaf in path)) for part in parts if len(part) > 1]
    tables = [base(descent) for descent in descents]
    joined = [np.concatenate(leaves) for leaves in zip(*(table[1:-1] for table in tables))]
    level = NoiseLevel(*(np.concatenate(leaves) for leaves in zip(*(t.level for t in tables))))
    solver = Solver(level, *joined, tables[0].init)

    last = -1
    for (descent, table), (_, following) in pairwise(zip(descents, tables)):
        last += table.evaluations
        alpha, sigma = descent.alpha[-1], descent.sigma[-1]
        scale = following.level.alpha[0] / alpha
        jump = np.sqrt(np.maximum(following.level.sigma[0] ** 2 - (scale * sigma) ** 2, 0))
        for coefficients in solver[1:-1]:
            coefficients[last, 0] *= scale
            coefficients[last, 1:] = 0
        for std in (solver.noise, solver.noise_upper):
            std[last, 0] = np.hypot(std[last, 0], jump)
    return solver


def repaint(
    grid: NoiseLevel,
    schedule: Schedule,
    base: str = "ddpm",
    jump_length: int = 10,
    resamples: int = 10,
) -> Solver:
    """RePaint's resampling (Lugmayr et al., 2022, section 4.2), for ``editing.inpaint``.

    Every ``jump_length`` steps, counted from the grid's last node with noise, the sampler goes back
    up as many steps and comes down again, ``resamples`` passes in all, so that the painted part
    comes to fit the known one. A base of one evaluation a step makes N evaluations and, for each of
    the ceil(N / jump_length) - 1 places, (resamples - 1) jump_length more: 2,410 for the paper's
    N = 250.

    ``base`` is a solver's name, with options if there are any: "ddim(eta=0.5)". jump_length lies in
    1..N - 1, resamples is >= 1, and 1 is the base alone.
    """
    count = len(nodes(grid)) - 1
    if not 1 <= jump_length < count:
        raise ValueError(
            f"jump_length must lie in 1..{count - 1} on a grid of {count} steps, got {jump_length}"
        )
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    order = [0]
    for above in reversed(range(0, count - jump_length, jump_length)):
        here = count - 1 - above
        order += range(order[-1] + 1, here + 1)
        order += [*range(here - jump_length, here + 1)] * (resamples - 1)
    order += range(order[-1] + 1, count + 1)
    path = NoiseLevel(*(np.asarray(leaf)[order] for leaf in grid))
    return jumps(path, _solver(base, schedule))


def restart(
    grid: NoiseLevel,
    schedule: Schedule,
    base: str = "heun",
    low: float | Sequence[float] = (0.06,),
    high: float | Sequence[float] = (0.3,),
    repeats: int | Sequence[int] = (2,),
    steps: int | Sequence[int] = (2,),
) -> Solver:
    """Restart sampling (Xu et al., 2023, alg. 1): K times, noise from t_min up to t_max, then down.

    It adds much noise at once and then follows the ODE: the noise contracts earlier errors, the ODE
    makes few new ones. Each argument after ``base`` is one number, or one for each interval. The
    defaults are the paper's smallest setting for CIFAR-10, (3 nodes, K = 2, 0.06, 0.30), with which
    Heun's 18 steps take 43 evaluations.

    Args:
      base: name of the ODE's solver, with options if there are any.
      low: sigma / alpha at an interval's lower end, moved to the grid's nearest inner node.
      high: sigma / alpha at the interval's upper end, above that node's.
      repeats: K >= 1.
      steps: steps >= 1 from high to low, spaced as ``grids.karras``; the paper's N_Restart - 1.
    """
    path = nodes(grid)
    inner = path[1:-1]
    if not inner:
        raise ValueError("restart needs a grid of at least 2 steps, got one of 1")
    detours: dict[int, list[NoiseLevel]] = {}
    intervals = np.broadcast_arrays(*map(np.atleast_1d, (low, high, repeats, steps)))
    for bottom, top, count, number in zip(*intervals):
        at = 1 + int(np.argmin([abs(node.ratio - bottom) for node in inner]))
        node = path[at]
        if not top > node.ratio:
            raise ValueError(
                f"high must lie above the grid's node nearest to low={bottom}, which is at "
                f"sigma / alpha = {node.ratio:.6g}; got {top}"
            )
        if count < 1 or number < 1:
            raise ValueError(f"repeats and steps must be at least 1, got {count} and {number}")
        ramp = np.linspace(top ** (1 / 7), node.ratio ** (1 / 7), number + 1) ** 7
        levels = grids.from_sigmas(schedule, [top, *ramp[1:]])
        down = [NoiseLevel(*leaves) for leaves in zip(*levels)]
        detours.setdefault(at, []).extend([*down[:-1], node] * int(count))
    whole = [level for i, node in enumerate(path) for level in (node, *detours.get(i, ()))]
    stacked = NoiseLevel(*(np.array(leaf) for leaf in zip(*whole)))
    return jumps(stacked, _solver(base, schedule))


def _solver(base: str, schedule: Schedule) -> Callable[[NoiseLevel], Solver]:
    from diffusion.sampling import solvers

    return specs.function(base, solvers.CHOICES, "base", {"schedule": schedule})
