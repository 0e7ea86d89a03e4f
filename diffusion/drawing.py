"""Draws from an experiment's model as its config says: solver, guidance, clipping, seeds."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.build import Experiment
from diffusion.conditioning import Conditioning
from diffusion.sampling.progress import Monitor, Preview
from diffusion.sampling.sample import image_keys, make_sampler, sample, sample_many
from diffusion.sampling.tables import Solver

LONG = 100
"""Evaluations from which a bar shows each; a sampler with a callback is compiled in every run."""


class Drawer:
    """Compiled once, draws often; image i, of class i mod K, is the same however many are drawn."""

    def __init__(self, experiment: Experiment, preview: Preview | None = None):
        """``preview`` is given x_0_hat every ``config.sampler.preview_every`` evaluations."""
        self.experiment = experiment
        every = experiment.config.sampler.preview_every if preview else 0
        long = sys.stderr.isatty() and experiment.solver.evaluations >= LONG
        self._monitor = Monitor(jax.local_device_count(), preview, every) if every or long else None
        guide = experiment.guidance
        self._others = guide.params()  # of a weaker model, of a classifier
        self._draw = make_sampler(
            guide.networks,
            experiment.train.shape,
            guide.guide,
            corrector=experiment.corrector,
            callback=self._monitor,
        )

    def draw(
        self, params: Any, count: int, solver: Solver | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """x [count, ...] and labels [count], None if unconditional.

        ``solver`` is by default the config's.
        """
        c = self.experiment.config.sampler
        cond, bar = self.conditioning(count), sys.stderr.isatty()
        solver = self.experiment.solver if solver is None else solver
        watch = nullcontext()
        if self._monitor is not None:
            watch = self._monitor.watch(-(-count // c.batch_size), solver.evaluations, bar)
        with watch:
            x = sample_many(
                self._draw,
                {"model": params, **self._others},
                solver,
                cond,
                count,
                jnp.float32(c.guidance),
                batch_size=c.batch_size,
                seed=c.seed,
                progress=bar and self._monitor is None,
            )
        return x, cond.label

    def trajectory(self, params: Any, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """x [R + 1, count, ...] before each evaluation and at the end, and labels.

        Divided by sqrt(alpha^2 + sigma^2), so that noise looks alike on every schedule.
        """
        c, solver = self.experiment.config.sampler, self.experiment.solver
        cond = self.conditioning(count)

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

    def conditioning(self, count: int) -> Conditioning:
        """Of the first ``count`` images: class i mod K, or none."""
        classes = self.experiment.guidance.num_classes
        return Conditioning(label=np.arange(count, dtype=np.int32) % classes if classes else None)
