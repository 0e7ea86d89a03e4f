"""Learned few-step solvers: times and weights found by gradient against a many-step teacher.

A sampler's table is an argument of ``sample``, so the distance of its samples to a teacher's, from
the same initial noise, can be differentiated in every number of it. What is learned here are the
times t_i and, in each step, the weights of this and the K - 1 earlier estimates:

    x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) sum_j w_j D_{i-j},     sum_j w_j = 1.

DDIM (w = 1), DPM-Solver++ 2M and 3M are members, and so is every method that is exact where D does
not change: a point mass is still reproduced exactly. Close to non-stationary bespoke solvers (Shaul
et al., 2024), to S4S (Frankel et al., 2025) and, for the times alone, LD3 (Tong et al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from diffusion.conditioning import Conditioning
from diffusion.denoiser import Denoise
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.sample import image_keys, sample
from diffusion.sampling.tables import REGISTERS, Solver
from diffusion.schedules import Schedule


class Coefficients(NamedTuple):
    """What is learned.

    Attributes:
      log_steps: [N] logarithms of the steps in time, up to a common factor.
      earlier: [N, K - 1] weights of the earlier estimates, newest first; that of the current one
        is 1 minus their sum.
    """

    log_steps: Array
    earlier: Array


class Learned(NamedTuple):
    """A learned solver and how far it is from its teacher.

    Attributes:
      solver: the table, float64 NumPy.
      start: root mean square distance to the teacher of the solver that learning began with, on
        initial noise not learned from.
      error: the same of the learned one.
      history: [(iteration, that distance), ...].
    """

    solver: Solver
    start: float
    error: float
    history: list[tuple[int, float]]


def coefficients(solver: Solver, t_end: float = 0.0, memory: int = 4) -> Coefficients:
    """Those of a multistep solver in data prediction (DDIM, DPM-Solver++ 2M or 3M).

    Args:
      solver: its table.
      t_end: the grid's last time.
      memory: K, how many estimates the learned solver combines, 1 to 6.

    Raises:
      ValueError: for a solver of another form, or one that draws noise.
    """
    times = np.append(solver.level.t, t_end)
    if np.any(solver.noise) or np.any(np.diff(times) >= 0) or not 1 <= memory <= REGISTERS:
        raise ValueError("learning starts from a deterministic solver with one evaluation a step")
    b = solver.b[:, 0] + solver.b_raw[:, 0]
    gain = b + solver.A[:, 0, 1:].sum(axis=1)
    remembers = np.all(solver.b[:-1, 1] == 1) or not np.any(solver.A[:, 0, 1:])
    if not remembers or np.any(gain == 0):
        raise ValueError(
            "learning starts from a table that combines estimates of x_0: ddim, dpmpp_2m, dpmpp_3m"
        )
    earlier = (solver.A[:, 0, 1:] / gain[:, None])[:, : memory - 1]
    return Coefficients(np.log(-np.diff(times)), earlier)


def build(learned: Coefficients, schedule: Schedule, t_start: float, t_end: float = 0.0) -> Solver:
    """The table with these coefficients, from t_start to t_end; traceable and differentiable."""
    fractions = jnp.cumsum(jax.nn.softmax(learned.log_steps))[:-1]
    times = t_start + (t_end - t_start) * fractions
    ends = jnp.asarray(t_start), jnp.asarray(t_end)
    levels = schedule(jnp.concatenate([ends[0][None], times, ends[1][None]]))
    now = NoiseLevel(*(a[:-1] for a in levels))
    after = NoiseLevel(*(a[1:] for a in levels))
    keep = after.sigma / now.sigma
    gain = after.alpha - now.alpha * keep
    rows, k = learned.earlier.shape
    # A weight of an estimate that does not exist yet goes to the current one.
    exists = jnp.arange(rows)[:, None] > jnp.arange(k)[None]
    earlier = jnp.where(exists, learned.earlier, 0.0)
    A = jnp.zeros((rows, REGISTERS, REGISTERS))
    A = A.at[:, 0, 0].set(keep).at[:, 0, 1 : k + 1].set(gain[:, None] * earlier)
    for j in range(1, k):
        A = A.at[:, j + 1, j].set(1.0)  # the registers y_1, y_2, ... hold the earlier estimates
    b = jnp.zeros((rows, REGISTERS)).at[:, 0].set(gain * (1 - earlier.sum(axis=1)))
    b = b.at[:, 1].set(1.0 if k else 0.0)
    nothing = jnp.zeros_like(b)
    init = jnp.hypot(now.alpha[0], now.sigma[0])
    return Solver(now, A, b, nothing, nothing, nothing, init)


def learn(
    denoise: Callable[[Any, Conditioning], Denoise],
    weights: Any,
    schedule: Schedule,
    start: Solver,
    teacher: Solver,
    cond: Conditioning,
    shape: tuple[int, ...],
    *,
    t_end: float = 0.0,
    count: int = 512,
    held_out: int = 128,
    batch_size: int = 64,
    iterations: int = 300,
    learning_rate: float = 0.02,
    memory: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> Learned:
    """Minimises the mean squared distance to the teacher's samples, by Adam.

    Args:
      denoise: (weights, cond) -> Denoise, guidance included.
      weights: of the network; not changed.
      schedule: gives the levels at the learned times.
      start: the solver to begin with, deterministic and of one evaluation a step.
      teacher: a many-step solver that starts at the same level, deterministic.
      cond: conditioning of the samples learned from and held out, leaves [count + held_out, ...].
      shape: one sample's.
      t_end: where both grids end.
      count, held_out: samples of the teacher to learn from, and to choose the result by.
      batch_size: of each iteration; divides count and held_out.
      iterations, learning_rate: of Adam; the rate falls along a cosine.
      memory: K, how many estimates each step combines.
      seed: of the initial noise.
      progress: whether to show a bar.

    Returns:
      The coefficients that were best on the held-out samples, as a table.

    Raises:
      ValueError: for a start that cannot be learned from, or levels that do not agree.
    """
    if count % batch_size or held_out % batch_size:
        raise ValueError(f"count={count} and held_out={held_out} must be multiples of {batch_size}")
    if not np.isclose(start.level.t[0], teacher.level.t[0]):
        raise ValueError(
            f"teacher and start must begin at the same time, got {teacher.level.t[0]:.6g} and "
            f"{start.level.t[0]:.6g}"
        )
    table = partial(build, schedule=schedule, t_start=float(start.level.t[0]), t_end=t_end)

    def draw(solver: Solver, weights: Any, batch: tuple) -> Array:
        index, cond = batch
        keys = image_keys(seed, index)
        return sample(denoise(weights, cond), solver, keys, shape)

    def loss(learned: Coefficients, weights: Any, batch: tuple, target: Array) -> Array:
        return jnp.mean((draw(table(learned), weights, batch) - target) ** 2)

    optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, iterations))

    @jax.jit
    def update(learned, state, weights, batch, target):
        gradient = jax.grad(loss)(learned, weights, batch, target)
        # One bad image must not throw the coefficients away: its gradient's size is not trusted.
        norm = optax.global_norm(gradient)
        gradient = jax.tree.map(
            lambda g: jnp.where(jnp.isfinite(norm), g / (norm + 1e-12), 0), gradient
        )
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(learned, change), state

    batches = [
        (index, jax.tree.map(lambda a, index=index: a[index], cond))
        for index in np.arange(count + held_out).reshape(-1, batch_size)
    ]
    teach, measure = jax.jit(draw), jax.jit(loss)
    targets = [teach(teacher, weights, batch) for batch in batches]
    first = count // batch_size

    def error(learned: Coefficients) -> float:
        squares = [
            float(measure(learned, weights, *pair))
            for pair in zip(batches[first:], targets[first:])
        ]
        return float(np.sqrt(np.mean(squares)))

    learned = jax.tree.map(jnp.float32, coefficients(start, t_end, memory))
    state = optimizer.init(learned)
    history = [(0, error(learned))]
    best = learned
    with tqdm(total=iterations, desc="learning", disable=not progress) as bar:
        for i in range(iterations):
            j = i % first
            learned, state = update(learned, state, weights, batches[j], targets[j])
            bar.update()
            if (i + 1) % 20 == 0 or i + 1 == iterations:
                history.append((i + 1, error(learned)))
                bar.set_postfix_str(f"error {history[-1][1]:.4g}, at first {history[0][1]:.4g}")
                if history[-1][1] <= min(e for _, e in history):
                    best = learned
    solver = jax.tree.map(lambda a: np.asarray(a, np.float64), table(best))
    return Learned(solver, history[0][1], min(e for _, e in history), history)


def save(path: str, solver: Solver) -> None:
    """Writes a table as ``.npz``."""
    level = {f"level_{name}": leaf for name, leaf in solver.level._asdict().items()}
    rest = {name: leaf for name, leaf in solver._asdict().items() if name != "level"}
    np.savez(path, **level, **rest)


def load(path: str) -> Solver:
    """Reads what ``save`` wrote.

    Raises:
      ValueError: for a file that is not a table.
      FileNotFoundError: if there is none.
    """
    with np.load(path) as data:
        names = [*(f"level_{n}" for n in NoiseLevel._fields), *Solver._fields[1:]]
        missing = [name for name in names if name not in data]
        if missing:
            raise ValueError(f"{path} is not a solver's table: it has no {', '.join(missing)}")
        leaves = [data[name] for name in names]
    solver = Solver(NoiseLevel(*leaves[:3]), *leaves[3:])
    if solver.A.shape != (len(solver.level.t), REGISTERS, REGISTERS):
        raise ValueError(f"{path} has registers of shape {solver.A.shape}, expected {REGISTERS}")
    return solver
