"""Whether a text-to-image model uses its captions: held-out losses with other captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import specs
from diffusion.data.sources import Batch, Source, affordable
from diffusion.errors import check_range
from diffusion.evaluation.intervals import of_mean
from diffusion.evaluation.metrics.metric import Judged, Metric, seen
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.objective import Context
from diffusion.objectives.times import CHOICES, TimeDistribution, uniform
from diffusion.schedules import RectifiedFlow


def caption_gap(
    pipeline: Any,
    params: Any,
    source: Source,
    *,
    times: TimeDistribution = uniform,
    draws: int = 8,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Any]:
    """The loss with each example's caption, with another example's and with the empty one.

    All three see the same noise and times. If the model did not use the text, the first two would
    be equal; the share of examples whose own caption has the smaller loss would be a half.

    Args:
      pipeline, params: a model of captions or prompts.
      source: captioned examples, held out; every one is used.
      times: time distribution of the loss, whose weighting is simple.
      draws: noise levels per example; its loss is the mean over them.
      seed: of the noise, and of the choice of other captions.

    Returns:
      JSON-ready: loss, loss_other and loss_empty; gap = loss_other - loss with the half width
      gap_ci of its 95 % interval over examples; gap_empty and gap_empty_ci likewise; own_preferred,
      the share of examples, and its standard error; count and draws.
    """
    rng = np.random.default_rng(seed)
    other = _others(source.captions, rng)
    p = pipeline
    objective = Denoising(p.network, p.schedule, p.prediction, p.c_noise, times)

    @jax.jit
    def losses(params: Any, batch: Batch, keys: jax.Array) -> jax.Array:
        def one(example: Batch, key: jax.Array) -> jax.Array:
            example = jax.tree.map(lambda leaf: leaf[None], example)
            return objective.loss(params, Context(train=False), example, key)[0]

        return jax.vmap(one)(batch, keys)

    def mean_losses(captions: Sequence[str]) -> np.ndarray:
        total = []
        for start in range(0, len(source), batch_size):
            index = np.minimum(np.arange(start, start + batch_size), len(source) - 1)
            cond, _ = pipeline.conditioner(params, [captions[i] for i in index])
            batch = {name: value for name, value in vars(cond).items() if value is not None}
            batch["x"] = seen(pipeline, params, source.read(index)["x"])
            batch["index"] = index.astype(np.int32)
            key, weights = jax.random.key(seed), {"network": params["network"]}
            draw = [
                losses(weights, batch, jnp.broadcast_to(jax.random.fold_in(key, d), index.shape))
                for d in range(draws)
            ]
            total.append(np.mean(draw, axis=0)[: len(source) - start])
        return np.concatenate(total)

    own = mean_losses(source.captions)
    wrong = mean_losses([source.captions[i] for i in other])
    empty = mean_losses([""] * len(source))
    preferred = float((own < wrong).mean())
    return {
        "loss": float(own.mean()),
        "loss_other": float(wrong.mean()),
        "loss_empty": float(empty.mean()),
        "gap": float((wrong - own).mean()),
        "gap_ci": of_mean(wrong - own),
        "gap_empty": float((empty - own).mean()),
        "gap_empty_ci": of_mean(empty - own),
        "own_preferred": preferred,
        "own_preferred_error": float(np.sqrt(preferred * (1 - preferred) / len(own))),
        "count": len(own),
        "draws": draws,
    }


def _others(captions: Sequence[str], rng: np.random.Generator) -> np.ndarray:
    """For each example the index of another example, which has another caption."""
    numbers = np.unique(np.asarray(captions), return_inverse=True)[1]
    if numbers.max(initial=0) == 0:
        raise ValueError("expected examples of at least two captions")
    other = rng.integers(0, len(numbers), len(numbers))
    while (same := numbers[other] == numbers).any():
        other[same] = rng.integers(0, len(numbers), same.sum())
    return other


def metric(times: str = "uniform", draws: int = 8) -> Metric:
    """``caption_gap`` on held-out examples, with the prefix ``captions_``.

    ``times`` is the name of the loss's time distribution, which should be that of training.
    """
    check_range("draws", draws, 1, 10_000)
    chosen = specs.function(times, CHOICES, "times")
    chosen(np.full(1, 0.5), RectifiedFlow())  # its options are checked in the call

    def measure(judged: Judged) -> dict[str, Any]:
        source = affordable(judged.data().held_out)
        if len(set(source.captions)) < 2:
            raise ValueError("caption_gap needs two different held-out captions at least")
        found = caption_gap(judged.pipeline, judged.params, source, times=chosen, draws=draws)
        return {f"captions_{name}": figure for name, figure in found.items()}

    return Metric(measure, outputs=())
