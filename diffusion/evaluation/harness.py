"""Judging a pipeline by metrics, all of them on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from diffusion import specs
from diffusion.errors import field, wrong_types
from diffusion.evaluation import metrics
from diffusion.evaluation.metrics import bits
from diffusion.evaluation.metrics.metric import Data, Drawn, Metric

AUTO = "auto"


def make(given: str | Sequence[str], pipeline: Any, name: str = "metrics") -> dict[str, Metric]:
    """Metrics by their specs, of ``metrics.CHOICES``; "auto" are those that need nothing but the
    data of the pipeline that is to be judged. ``name`` is what errors call the specs."""
    if given == AUTO:
        text = pipeline.conditioner.subject == "text"
        given = ("caption_gap()", "retrieval()", "nearest()") if text else pipeline.view.metrics
    with field(f"{name}={given!r}"), wrong_types():
        made = specs.values(given, metrics.CHOICES, name, bits.CHOICES)
    return dict(zip(specs.texts(given), made))


def evaluate(
    chosen: Mapping[str, Metric], pipeline: Any, params: Any, data: Data, draw: Callable[[], Drawn]
) -> dict[str, Any]:
    """The figures of all metrics, by name.

    ``draw`` makes the samples; it is called once, and only if a metric needs them.
    """
    once, figures = cache(draw), {}
    for spec, metric in chosen.items():
        with field(spec):
            found = metric(pipeline, params, data, once)
        if both := figures.keys() & found.keys():
            raise ValueError(f"two metrics give the figure {sorted(both)[0]}")
        figures |= found
    return figures


def lines(figures: Mapping[str, Any]) -> list[str]:
    """The main figures in words, a line each, real data's beside those of samples."""
    text = []
    for name, figure in figures.items():
        if isinstance(figure, Mapping) and "bits_per_dim" in figure:
            text += [f"{name}: {line}" for line in lines(figure)]
        elif isinstance(figure, float) and not name.endswith("_real"):
            real = figures.get(f"{name}_real")
            beside = f" (real data {real:.4g})" if isinstance(real, float) else ""
            text.append(f"{name}: {figure:.4g}{beside}")
    return text
