"""Few-step solvers learned by gradient from a many-step solver of the same network, the teacher.

A sampler's table is an argument of ``sample``, so the distance of its samples to a teacher's, from
the same initial noise, can be differentiated in every number of it. Free here are the times t_i
and, in each step, the weights of the current and the K - 1 earlier estimates:

    x' = (sigma'/sigma) x + (alpha' - alpha sigma'/sigma) sum_j w_j D_{i-j},     sum_j w_j = 1.

DDIM (w = 1), DPM-Solver++ 2M and 3M are members of this family. Every member is exact where D does
not change, so that it reproduces a point mass exactly. Close relatives are non-stationary bespoke
solvers (Shaul et al., 2024), S4S (Frankel et al., 2025) and, for the times alone, LD3 (Tong et al.,
2024).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from diffusion.conditioning import Conditioning
from diffusion.denoiser import Denoise
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.sample import image_keys, image_noise, sample
from diffusion.sampling.tables import REGISTERS, Solver
from diffusion.schedules import Schedule


class Coefficients(NamedTuple):
    """The free numbers of a table."""

    log_steps: Array  # [N] logarithms of the steps in time, up to a common factor
    earlier: Array  # [N, K - 1] weights of the earlier estimates, newest first


def coefficients(
    solver: Solver, schedule: Schedule, t_end: float = 0.0, memory: int = 4
) -> Coefficients:
    """The coefficients of a multistep solver in data prediction (DDIM, DPM-Solver++ 2M or 3M).

    A table of another form, or that draws noise, is refused. ``t_end`` is the grid's last time,
    ``memory`` K, the number of estimates that a step combines, 1 to 6.
    """
    times = np.append(schedule.argument(solver.level), t_end)
    if np.any(solver.noise) or np.any(np.diff(times) >= 0) or not 1 <= memory <= REGISTERS:
        raise ValueError(
            "learning starts from a deterministic solver with one evaluation a step, and memory in "
            f"1..{REGISTERS}; got a solver with noise or stages, or memory={memory}"
        )
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
    levels = schedule(jnp.concatenate([jnp.array([t_start]), times, jnp.array([t_end])]))
    now, after = (NoiseLevel(*(a[part] for a in levels)) for part in (slice(-1), slice(1, None)))
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


class Lessons(NamedTuple):
    """A teacher's samples, ``target`` [P, ...], and the noise [P, ...] that they come from."""

    noise: Array
    cond: Conditioning
    target: Array

    def batches(self, size: int) -> Iterator[Lessons]:
        """Batches of ``size``; the last may be smaller."""
        for start in range(0, len(self.noise), size):
            yield jax.tree.map(lambda a, start=start: a[start : start + size], self)

    def split(self, count: int) -> tuple[Lessons, Lessons]:
        """The first ``count`` lessons, and the others."""
        return jax.tree.map(lambda a: a[:count], self), jax.tree.map(lambda a: a[count:], self)


class Learned(NamedTuple):
    """A learned solver, and [(iteration, root mean square distance on held-out lessons), ...]."""

    solver: Solver
    history: list[tuple[int, float]]


class Student:
    """A network whose samplers learn and are measured; compiled once per number of evaluations.

    ``denoise(weights, cond)`` returns the denoiser, guidance included.
    """

    def __init__(self, denoise: Callable[[Any, Conditioning], Denoise], weights: Any):
        self._denoise, self._weights = denoise, weights
        self._draw = jax.jit(self.draw)

    def draw(self, weights: Any, solver: Solver, noise: Array, cond: Conditioning) -> Array:
        """Samples [B, ...] of a deterministic solver from noise [B, ...]; traceable."""
        keys = image_keys(0, np.arange(len(noise)))  # nothing is drawn with them
        x = solver.init * noise
        return sample(self._denoise(weights, cond), solver, keys, noise.shape[1:], x_init=x)

    def lessons(
        self,
        teacher: Solver,
        cond: Conditioning,
        count: int,
        shape: tuple[int, ...],
        *,
        batch_size: int = 64,
        seed: int = 0,
        progress: bool = True,
    ) -> Lessons:
        """The teacher's samples for images 0..count-1 of a seed; cond has leaves [count, ...]."""
        keys = image_keys(seed, np.arange(count))
        noise = np.asarray(jax.jit(image_noise, static_argnums=1)(keys, shape))
        lessons = Lessons(noise, cond, noise)
        targets = []
        with tqdm(total=count, desc="teacher", unit="image", disable=not progress) as bar:
            for batch in lessons.batches(batch_size):
                drawn = self._draw(self._weights, teacher, batch.noise, batch.cond)
                targets.append(np.asarray(drawn))
                bar.update(len(drawn))
        return lessons._replace(target=np.concatenate(targets))

    def error(self, solver: Solver, lessons: Lessons, batch_size: int = 64) -> float:
        """Root mean square distance of the solver's samples to the teacher's."""
        squares = 0.0
        for batch in lessons.batches(batch_size):
            drawn = self._draw(self._weights, solver, batch.noise, batch.cond)
            squares += float(np.sum((np.asarray(drawn, np.float64) - batch.target) ** 2))
        return float(np.sqrt(squares / lessons.target.size))

    def learn(
        self,
        schedule: Schedule,
        start: Solver,
        lessons: Lessons,
        held_out: Lessons,
        *,
        t_end: float = 0.0,
        batch_size: int = 64,
        iterations: int = 300,
        learning_rate: float = 0.02,
        memory: int = 4,
        progress: bool = True,
    ) -> Learned:
        """Minimises the mean squared distance to the teacher's samples, by Adam.

        It begins with the solver ``start``; the table that is returned is best on the ``held_out``
        lessons. The learning rate falls along a cosine. ``batch_size`` lessons, at most all, make
        an iteration; for ``t_end`` and ``memory`` see ``coefficients``.
        """
        if len(lessons.noise) < batch_size:
            raise ValueError(f"batch_size={batch_size} is more than {len(lessons.noise)} lessons")
        t_start = float(schedule.argument(start.level)[0])
        optimizer = optax.adam(optax.cosine_decay_schedule(learning_rate, iterations))

        def loss(learned: Coefficients, weights: Any, batch: Lessons) -> Array:
            solver = build(learned, schedule, t_start, t_end)
            drawn = self.draw(weights, solver, batch.noise, batch.cond)
            return jnp.mean((drawn - batch.target) ** 2)

        @jax.jit
        def update(learned, state, weights, batch):
            gradient = jax.grad(loss)(learned, weights, batch)
            # Gradients are normalised, so that one bad batch cannot ruin the coefficients.
            norm = optax.global_norm(gradient)
            scale = jnp.where(jnp.isfinite(norm), 1 / (norm + 1e-12), 0.0)
            gradient = jax.tree.map(lambda g: jnp.nan_to_num(g) * scale, gradient)
            change, state = optimizer.update(gradient, state)
            return optax.apply_updates(learned, change), state

        def table(learned: Coefficients) -> Solver:
            built = build(learned, schedule, t_start, t_end)
            return jax.tree.map(lambda a: np.asarray(a, np.float64), built)

        learned = jax.tree.map(jnp.float32, coefficients(start, schedule, t_end, memory))
        state, best = optimizer.init(learned), learned
        history = [(0, self.error(table(learned), held_out, batch_size))]
        whole = len(lessons.noise) // batch_size * batch_size  # all batches have one size
        batches = itertools.cycle(list(lessons.split(whole)[0].batches(batch_size)))
        with tqdm(total=iterations, desc="learning", disable=not progress) as bar:
            for i in range(1, iterations + 1):
                learned, state = update(learned, state, self._weights, next(batches))
                bar.update()
                if i % 20 and i < iterations:
                    continue
                history.append((i, self.error(table(learned), held_out, batch_size)))
                bar.set_postfix_str(f"error {history[-1][1]:.4g}, at first {history[0][1]:.4g}")
                if history[-1][1] <= min(error for _, error in history):
                    best = learned
        return Learned(table(best), history)
