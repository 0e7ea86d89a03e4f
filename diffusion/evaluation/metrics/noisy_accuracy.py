"""Accuracy of a classifier of noised examples, by noise level."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data.sources import Source
from diffusion.levels import NoiseLevel, diffuse
from diffusion.objectives.classification import Classification


def accuracy_by_level(
    objective: Classification,
    params: Any,
    source: Source,
    levels: int = 10,
    *,
    batch_size: int = 500,
    seed: int = 0,
) -> list[dict[str, float]]:
    """The accuracy on all of ``source`` at ``levels`` times, evenly spaced in (0, t_max].

    Returns:
      A dict per level with t, sigma_over_alpha, accuracy and cross_entropy (nats).
    """
    data = source.all()
    noise = np.random.default_rng(seed).standard_normal(data["x"].shape, np.float32)

    @jax.jit
    def judge(params, x0, noise, label, level):
        logits = objective.classifier(params)(diffuse(x0, noise, level), level)
        log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)
        return logits.argmax(-1) == label, -log_p[:, 0]

    results = []
    for t in np.linspace(0, objective.schedule.t_max, levels + 1)[1:]:
        level = NoiseLevel(*(np.float32(leaf) for leaf in objective.schedule(t)))
        hits, losses = [], []
        for start in range(0, len(noise), batch_size):
            part = slice(start, start + batch_size)
            hit, loss = judge(params, data["x"][part], noise[part], data["label"][part], level)
            hits.append(hit)
            losses.append(loss)
        with np.errstate(divide="ignore"):
            ratio = float(level.sigma / level.alpha)
        accuracy, loss = (float(np.concatenate(parts).mean()) for parts in (hits, losses))
        result = {"t": float(t), "sigma_over_alpha": ratio}
        results.append(result | {"accuracy": accuracy, "cross_entropy": loss})
    return results
