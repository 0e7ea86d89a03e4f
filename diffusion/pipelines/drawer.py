"""Draws any number of samples from a pipeline, batch by batch, compiled once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from diffusion.conditioning import Conditioning
from diffusion.pipelines import draw as drawing
from diffusion.pipelines import tasks
from diffusion.pipelines.codec import check_finite
from diffusion.pipelines.conditioners import Subject
from diffusion.pipelines.draw import Companion, Inputs
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pretrained.schedulers import Sampler
from diffusion.sampling.acceleration import NONE, Acceleration
from diffusion.sampling.guidance.chain import Chain
from diffusion.sampling.langevin import Corrector
from diffusion.sampling.progress import Monitor, Preview
from diffusion.sampling.sample import image_keys
from diffusion.sampling.tables import Solver

LONG = 100
"""Evaluations from which a bar shows each; a sampler with a callback is compiled in every run."""

GIVEN = {
    "image": (
        "pictures to edit: --mode=generate takes one in config.samples.image, other modes those of "
        "config.data.name='edits'"
    ),
    "hint": (
        "hints to follow: --mode=generate takes them by config.control, other modes by "
        "config.data.hint"
    ),
    "image_features": "pictures as prompts: --mode=generate takes them by config.image_prompts",
}
"""What a column of a batch is, for errors."""
Prepare = Callable[[np.ndarray, jax.Array, Conditioning, Conditioning | None], Inputs]
"""(numbers of the samples [B], keys [B], cond, null) -> their ``Inputs``."""


@dataclass(frozen=True, eq=False)
class Drawer:
    """Draws from one pipeline in one way; sample i is the same however many are drawn.

    Attributes:
      pipeline: the model.
      sampler: steps and table.
      chain: of guidance.
      companions: other networks that the chain calls, by name.
      acceleration: what makes evaluations cheaper.
      corrector: follows each of the solver's steps, or None.
      batch_size: samples at a time.
      seed: of all noise.
      condition: options of the pipeline's conditioner.
      preview: is given x_0_hat after every so many evaluations (``preview_every``).
      unit: what bars count.
      paired: whether guidance makes two estimates at each evaluation.
      given: what samples are given in turn besides labels or texts, rows [N, ...] by the names of
        the pipeline's ``columns``.
    """

    pipeline: Pipeline
    sampler: Sampler
    chain: Chain = ()
    _: KW_ONLY
    companions: Mapping[str, Companion] = field(default_factory=dict)
    acceleration: Acceleration = NONE
    corrector: Corrector | None = None
    batch_size: int = 1
    seed: int = 0
    condition: Mapping[str, Any] = field(default_factory=dict)
    preview: Preview | None = None
    preview_every: int = 0
    unit: str = "image"
    paired: bool = False
    given: Mapping[str, np.ndarray] = field(default_factory=dict)

    @cached_property
    def _monitor(self) -> Monitor | None:
        every = self.preview_every if self.preview else 0
        long = sys.stderr.isatty() and self.sampler.solver.evaluations >= LONG
        return Monitor(jax.local_device_count(), self.preview, every) if every or long else None

    def batches(
        self,
        params: Params,
        subjects: Sequence[Subject],
        negative: Subject | None = None,
        *,
        solver: Solver | None = None,
        prepare: Prepare | None = None,
        first: int = 0,
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(numbers of the samples, x [B, ...] as the network sees them), batch by batch.

        Args:
          params: of the pipeline.
          subjects: one for each sample.
          negative: what to steer away from; None: what stands for none.
          solver: another table than the sampler's.
          prepare: makes a batch's inputs; by default new samples of the network's own size, or
            edits, of what is ``given``.
          first: number of the first sample.
        """
        count = len(subjects)
        size = min(self.batch_size, count)
        evaluations = (self.sampler.solver if solver is None else solver).evaluations
        watch, bar_shown = nullcontext(), sys.stderr.isatty()
        if self._monitor is not None:
            watch = self._monitor.watch(-(-count // size), evaluations, bar_shown)
        silent = not bar_shown or self._monitor is not None
        with watch, tqdm(total=count, unit=self.unit, desc="sampling", disable=silent) as bar:
            for start in range(0, count, size):
                # The last batch is filled up, so that nothing compiles twice.
                index = np.minimum(np.arange(start, start + size), count - 1)
                keys = image_keys(self.seed, first + index)
                cond, null = self.conditioning(params, [subjects[i] for i in index], negative)
                inputs = (
                    self._inputs(params, first + index, cond, null)
                    if prepare is None
                    else prepare(first + index, keys, cond, null)
                )
                x = self.batch(params, keys, inputs, solver)
                left = count - start
                check_finite(x[:left], f"sampling with seed {self.seed} gave", first + index)
                yield first + index[:left], x[:left]
                bar.update(min(size, left))

    def batch(
        self, params: Params, keys: jax.Array, inputs: Inputs, solver: Solver | None = None
    ) -> np.ndarray:
        """One batch of samples [B, ...], of keys [B]."""
        x = drawing.draw(
            self.pipeline,
            params,
            self.sampler if solver is None else self.sampler._replace(solver=solver),
            keys,
            inputs,
            self.chain,
            companions=self.companions,
            acceleration=self.acceleration,
            corrector=self.corrector,
            callback=self._monitor,
        )
        return np.asarray(x)

    def draw(
        self,
        params: Params,
        subjects: Sequence[Subject],
        negative: Subject | None = None,
        *,
        solver: Solver | None = None,
        prepare: Prepare | None = None,
        first: int = 0,
    ) -> np.ndarray:
        """All samples [N, ...] as the network sees them; arguments of ``batches``."""
        options = {"solver": solver, "prepare": prepare, "first": first}
        parts = self.batches(params, subjects, negative, **options)
        return np.concatenate([x for _, x in parts])

    def trajectory(
        self, params: Params, subjects: Sequence[Subject], negative: Subject | None = None
    ) -> np.ndarray:
        """[R + 1, N, ...] from noise to samples; see ``draw.trajectory``."""
        numbers = np.arange(len(subjects))
        keys, pair = image_keys(self.seed, numbers), self.conditioning(params, subjects, negative)
        inputs = self._inputs(params, numbers, *pair)
        return drawing.trajectory(
            self.pipeline,
            params,
            self.sampler,
            keys,
            inputs,
            self.chain,
            companions=self.companions,
            acceleration=self.acceleration,
            corrector=self.corrector,
        )

    def conditioning(
        self, params: Params, subjects: Sequence[Subject], negative: Subject | None = None
    ) -> tuple[Conditioning, Conditioning | None]:
        """What the samples are steered towards, and away from."""
        return self.pipeline.conditioner(params, subjects, negative, **self.condition)

    def _inputs(
        self, params: Params, numbers: np.ndarray, cond: Conditioning, null: Conditioning | None
    ) -> Inputs:
        """Of samples of these numbers."""
        given = {}
        for name in self.pipeline.columns:
            if name not in self.given:
                raise ValueError(f"this model is given {GIVEN[name]}, and there are none")
            rows = self.given[name]
            given[name] = rows[numbers % len(rows)]
        if self.pipeline.edits:
            return tasks.edited(self.pipeline, params, cond, null, given["image"], encoded=True)
        return tasks.new(self.pipeline, *tasks.followed(cond, null, given))

    def subjects(self, count: int, given: Sequence[Subject] = ()) -> list[Subject]:
        """Of ``count`` samples, those given in turn, by default the conditioner's suggestions."""
        listed = list(given) or list(self.pipeline.conditioner.suggestions) or [0]
        return [listed[i % len(listed)] for i in range(count)]
