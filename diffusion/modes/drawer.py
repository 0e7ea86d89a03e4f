"""Draws from an experiment's model as its config says: solver, guidance, clipping, seeds."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import jax
import numpy as np

from diffusion.conditioning import Conditioning, from_batch
from diffusion.config.experiment import Experiment
from diffusion.config.latents import Autoencoder
from diffusion.sampling.progress import Monitor, Preview
from diffusion.sampling.sample import image_keys, make_sampler, sample, sample_many
from diffusion.sampling.tables import Solver

LONG = 100
"""Evaluations from which a bar shows each; a sampler with a callback is compiled in every run."""

SHOWN = 10
"""Held-out captions drawn where none are asked for."""


class Drawer:
    """Compiled once, draws often; image i is the same however many are drawn.

    It is of class i mod K, or has caption i mod K.
    """

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
        self,
        params: Any,
        count: int,
        solver: Solver | None = None,
        captions: Sequence[str] = (),
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """x [count, ...] and labels [count], None if unconditional.

        ``solver`` is by default the config's, ``captions`` are ``self.captions``.
        """
        c = self.experiment.config.sampler
        captions = captions or self.captions
        cond, bar = self.conditioning(count, captions), sys.stderr.isatty()
        solver = self.experiment.solver if solver is None else solver
        watch = nullcontext()
        if self._monitor is not None:
            watch = self._monitor.watch(-(-count // c.batch_size), solver.evaluations, bar)
        with watch:
            x = sample_many(
                self._draw,
                self._weights(params, solver),
                solver,
                cond,
                count,
                self.experiment.guidance.chain,
                batch_size=c.batch_size,
                seed=c.seed,
                progress=bar and self._monitor is None,
            )
        return x, self.labels(count, captions)

    def trajectory(self, params: Any, count: int) -> tuple[np.ndarray, np.ndarray | None]:
        """x [R + 1, count, ...] before each evaluation and at the end, and labels.

        Divided by sqrt(alpha^2 + sigma^2), so that noise looks alike on every schedule.
        """
        c, solver = self.experiment.config.sampler, self.experiment.solver
        cond = self.conditioning(count)

        @jax.jit
        def run(params, solver):
            guide = self.experiment.guidance
            denoise = guide.guide(guide.networks(params), cond, guide.chain)
            keys = image_keys(c.seed, np.arange(count))
            shape, corrector = self.experiment.train.shape, self.experiment.corrector
            return sample(denoise, solver, keys, shape, corrector=corrector, trajectory=True)

        x, path = run(self._weights(params, solver), solver)
        scale = np.hypot(solver.level.alpha, solver.level.sigma)
        path = np.asarray(path.x) / scale.reshape((-1,) + (1,) * x.ndim)
        return np.concatenate([path, np.asarray(x)[None]]), self.labels(count)

    def _weights(self, params: Any, solver: Solver) -> dict[str, Any]:
        """All that is an argument of the compiled sampler besides its table."""
        acceleration = self.experiment.guidance.acceleration.at(solver.evaluations)
        return {"model": params, **self._others, "acceleration": acceleration}

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Asked for, by default ``SHOWN`` held-out ones; none of a model that knows no captions."""
        experiment = self.experiment
        if experiment.guidance.encode is None:
            return ()
        if given := tuple(experiment.config.samples.captions):
            return given
        held_out = list(dict.fromkeys(experiment.held_out.captions))
        chosen = np.linspace(0, len(held_out) - 1, min(SHOWN, len(held_out))).astype(int)
        return tuple(held_out[i] for i in chosen)

    def visible(self, x: np.ndarray) -> np.ndarray:
        """What the model draws, [..., h, w, C], as images [..., H, W, 1 or 3] in [-1, 1]."""
        return visible(x, self.experiment.autoencoder)

    def labels(self, count: int, captions: Sequence[str] = ()) -> np.ndarray | None:
        """Of the first ``count`` images: class or number of the caption, i mod K; or None."""
        classes = self.experiment.guidance.num_classes or len(captions or self.captions)
        return np.arange(count, dtype=np.int32) % classes if classes else None

    def conditioning(self, count: int, captions: Sequence[str] = ()) -> Conditioning:
        """Of the first ``count`` images."""
        captions = captions or self.captions
        labels = self.labels(count, captions)
        if not captions:
            return Conditioning(label=labels)
        rows = self.experiment.guidance.encode(captions)
        return from_batch({name: value[labels] for name, value in rows.items()})


def visible(x: np.ndarray, autoencoder: Autoencoder | None) -> np.ndarray:
    """Images as they can be shown: latents decoded, or by their first three channels, scaled."""
    if autoencoder is not None:
        return autoencoder.decode(x).clip(-1, 1)
    if x.shape[-1] in (1, 3):
        return x
    return (x[..., :3] / np.abs(x).max()).clip(-1, 1)
