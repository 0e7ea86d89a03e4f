"""Draws from an experiment's model as its config says: solver, guidance, clipping, seeds."""

from __future__ import annotations

import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.build import Experiment
from diffusion.conditioning import Conditioning
from diffusion.sampling.sample import image_keys, make_sampler, sample, sample_many


class Drawer:
    """Compiled once, draws often; image i, of class i mod K, is the same however many are drawn."""

    def __init__(self, experiment: Experiment):
        self.experiment = experiment
        guide = experiment.guidance
        self._others = guide.params()  # of a weaker model, of a classifier
        self._draw = make_sampler(
            guide.networks,
            experiment.train.shape,
            guide.guide,
            corrector=experiment.corrector,
        )

    def draw(self, params: Any, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """x [count, ...] and labels [count], None if unconditional."""
        c = self.experiment.config.sampler
        cond = self._conditioning(count)
        x = sample_many(
            self._draw,
            {"model": params, **self._others},
            self.experiment.solver,
            cond,
            count,
            jnp.float32(c.guidance),
            batch_size=c.batch_size,
            seed=c.seed,
            progress=sys.stderr.isatty(),
        )
        return x, cond.label

    def trajectory(self, params: Any, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """x [R + 1, count, ...] before each evaluation and at the end, and labels.

        Divided by sqrt(alpha^2 + sigma^2), so that noise looks alike on every schedule.
        """
        c, solver = self.experiment.config.sampler, self.experiment.solver
        cond = self._conditioning(count)

        @jax.jit
        def run(params, solver):
            guide = self.experiment.guidance
            denoise = guide.guide(guide.networks(params), cond, c.guidance)
            keys = image_keys(c.seed, np.arange(count))
            shape, corrector = self.experiment.train.shape, self.experiment.corrector
            return sample(denoise, solver, keys, shape, corrector=corrector, trajectory=True)

        x, path = run({"model": params, **self._others}, solver)
        scale = np.hypot(solver.level.alpha, solver.level.sigma)
        path = np.asarray(path.x) / scale.reshape((-1,) + (1,) * x.ndim)
        return np.concatenate([path, np.asarray(x)[None]]), cond.label

    def _conditioning(self, count: int) -> Conditioning:
        classes = self.experiment.guidance.num_classes
        return Conditioning(label=np.arange(count, dtype=np.int32) % classes if classes else None)
