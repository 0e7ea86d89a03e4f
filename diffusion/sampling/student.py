"""Few-step solvers learned by gradient from a many-step solver of the same network, the teacher."""

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
from diffusion.levels import Array
from diffusion.sampling.coefficients import Coefficients, build, coefficients
from diffusion.sampling.sample import image_keys, image_noise, sample
from diffusion.sampling.tables import Solver
from diffusion.schedules import Schedule


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

        Args:
          schedule: gives the levels at the learned times.
          start: the solver to begin with (``coefficients``).
          lessons: what the loss is computed on.
          held_out: the lessons on which the table that is returned is best.
          t_end: the grid's last time.
          batch_size: lessons per iteration, at most all.
          iterations, learning_rate: of Adam; the rate falls along a cosine.
          memory: K, the number of estimates that each step combines.
          progress: whether to show a bar.
        """
        if len(lessons.noise) < batch_size:
            raise ValueError(f"batch_size={batch_size} is more than {len(lessons.noise)} lessons")
        t_start = float(start.level.t[0])
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

        learned = jax.tree.map(jnp.float32, coefficients(start, t_end, memory))
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
