"""Averages of any profile, made after training from a few snapshots (EDM2, Karras et al., 2024).

A power-function average after T steps weights the parameters at time tau in [0, T] by the density
p(tau) = (gamma + 1) tau^gamma / T^(gamma + 1). (``ema.power_function`` does so exactly, if step s's
parameters count as those of (s - 1, s].) The target density is approximated by those of the
snapshots, p ~ sum_i x_i p_i, in the least squares sense (app. C): A x = b with A_ij = <p_i, p_j>
and b_i = <p_i, p>. Beyond the paper, sum_i x_i = 1 is required, so that parameters that do not
change over time are reproduced exactly. On random walks that makes the error three to fifteen times
smaller where snapshots are few. For sigma_rel in [0.05, 0.20], parameters of size 3 and walks of
size 1:

    snapshots of 0.05 and 0.10, each    4      8      16     32     (evenly spread over the run)
    largest error, of the size          7e-3   2e-3   4e-4   7e-5
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax.traverse_util import unflatten_dict

from diffusion.ema import Profile, gamma_from_sigma_rel
from diffusion.runs import snapshots


@dataclass(frozen=True)
class Mixture:
    """A linear combination of averages that approximates another.

    Attributes:
      coefficients: [n], their sum is 1.
      residual: || p - sum_i x_i p_i || / || p ||; 0 is exact. The error of a parameter theta is at
        most residual * || p || * || theta - c ||, norms over time, for any constant c.
    """

    coefficients: np.ndarray
    residual: float


@dataclass(frozen=True)
class Reconstruction:
    """A summary of ``reconstruct``: step, number of snapshots used, ``Mixture.residual``."""

    step: int
    snapshots: int
    residual: float


def inner(gamma_a: Any, t_a: Any, gamma_b: Any, t_b: Any) -> np.ndarray:
    """Integral of p_a p_b over time, for power functions that end at t_a and t_b; broadcasts.

    For t_a <= t_b it is (g_a + 1) (g_b + 1) / (g_a + g_b + 1) * (t_a / t_b)^g_b / t_b.
    """
    gamma_a, t_a, gamma_b, t_b = np.broadcast_arrays(
        *(np.asarray(value, np.float64) for value in (gamma_a, t_a, gamma_b, t_b))
    )
    late = np.where(t_a <= t_b, gamma_b, gamma_a)
    shorter, longer = np.minimum(t_a, t_b), np.maximum(t_a, t_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (shorter / longer) ** late / longer


def weights(profile: Profile, steps: int) -> np.ndarray:
    """[steps]: the weight of each step's parameters in an average, float64.

    The difference between their sum and 1 is the weight of the initial parameters.
    """
    beta = np.asarray(profile(np.arange(1, steps + 1)), np.float64)
    later = np.append(np.cumprod(beta[:0:-1])[::-1], 1.0)  # product of the betas that follow
    return (1 - beta) * later


def mix(kept: Sequence[tuple[float, int]], target: float | Profile, step: int) -> Mixture:
    """The coefficients of ``kept`` whose combination is nearest to a profile.

    ``kept`` are pairs (sigma_rel, step) of power-function averages, ``target`` is sigma_rel of one
    or any profile of ``ema``, and ``step``, at least 1, is where the average ends.
    """
    if not kept:
        raise ValueError("there are no snapshots to mix")
    if step < 1:
        raise ValueError(f"the step of an average must be at least 1, got {step}")
    gammas = np.array([gamma_from_sigma_rel(sigma_rel) for sigma_rel, _ in kept])
    ends = np.array([float(end) for _, end in kept])
    a = inner(gammas[:, None], ends[:, None], gammas, ends)
    if callable(target):
        w = weights(target, step)
        b, norm = np.array([w @ _power(g, end, step) for g, end in zip(gammas, ends)]), w @ w
    else:
        gamma = gamma_from_sigma_rel(target)
        b, norm = inner(gammas, ends, gamma, step), float(inner(gamma, step, gamma, step))
    n = len(kept)
    # Lagrange's conditions for least squares with sum 1; A is scaled to the size of the ones.
    system = np.block([[a * step, np.ones((n, 1))], [np.ones((1, n)), np.zeros((1, 1))]])
    right = np.append(b * step, 1.0)
    try:
        x = np.linalg.solve(system, right)[:n]
    except np.linalg.LinAlgError:  # the same average twice
        x = np.linalg.lstsq(system, right)[0][:n]
    rest = norm - 2 * b @ x + x @ a @ x
    return Mixture(x, float(np.sqrt(max(rest, 0.0) / norm)))


def reconstruct(
    workdir: str | os.PathLike, target: float | Profile, step: int | None = None
) -> tuple[Any, Reconstruction]:
    """An average that was not kept, from a run's snapshots.

    Args:
      workdir: the run's directory.
      target: sigma_rel of a power function in (0, 0.288], or any profile of ``ema``.
      step: at which the average ends, at most the last snapshot's (most exact at the steps of
        snapshots); None for the last.

    Returns:
      Parameters as nested dicts, float32, on the first device; and a summary.
    """
    kept = snapshots.listed(workdir)
    if not kept:
        raise FileNotFoundError(
            f"no snapshots in {workdir}/{snapshots.FOLDER}; config.train.snapshot_every=N saves "
            "them in training"
        )
    last = kept[-1].step
    step = last if step is None else step
    if step > last:
        raise ValueError(f"the last snapshot in {workdir} is of step {last}, before {step}")
    mixture = mix([(s.sigma_rel, s.step) for s in kept], target, step)
    used = [(x, s) for x, s in zip(mixture.coefficients, kept) if abs(x) > 1e-9]
    readers = [(x, snapshots.read(snapshot)) for x, snapshot in used]
    place = jax.local_devices()[0]
    params = {}
    for name in readers[0][1]:
        total = sum(x * read[name]().astype(np.float64) for x, read in readers)
        params[tuple(name.split("/"))] = jax.device_put(total.astype(np.float32), place)
    return unflatten_dict(params), Reconstruction(step, len(used), mixture.residual)


def _power(gamma: float, end: float, steps: int) -> np.ndarray:
    """[steps]: a power function's weights of the steps' parameters."""
    times = np.minimum(np.arange(steps + 1) / end, 1.0)
    return np.diff(times ** (gamma + 1))
