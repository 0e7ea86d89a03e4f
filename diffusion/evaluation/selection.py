"""Metrics and feature networks by their specs, as configs name them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffusion import errors, specs
from diffusion.evaluation import metrics, networks
from diffusion.evaluation.metrics import bits
from diffusion.evaluation.metrics.metric import Metric
from diffusion.evaluation.networks.network import Network
from diffusion.specs import unknown

AUTO = "auto"
Known = Mapping[str, Callable[..., Network]]


def network(given: str, name: str = "features", known: Known = networks.CHOICES) -> Network | None:
    """The feature network of a spec, of those that are ``known``; None of ""."""
    if not given:
        return None
    with errors.field(f"{name}={given!r}"), errors.wrong_types():
        return specs.value(given, known, name)


def make(
    given: str | Sequence[str],
    pipeline: Any,
    name: str = "metrics",
    default: Network | None = None,
    known: Known = networks.CHOICES,
) -> dict[str, Metric]:
    """Metrics by their specs, of ``metrics.CHOICES``.

    Args:
      given: specs; "auto" are those that need nothing but the data of the pipeline.
      pipeline: that is to be judged; None of samples from a file.
      name: what errors call the specs.
      default: the network of metrics that name none.
      known: networks that metrics may name.

    Raises:
      ValueError: a metric's network is not there, or not the one that it is defined for; a metric
        needs the model, and there is only a file.
    """
    if given == AUTO:
        text = pipeline is not None and pipeline.conditioner.subject == "text"
        given = () if pipeline is None else pipeline.view.metrics
        given = ("caption_gap()", "retrieval()", "memorisation()") if text else given
    inner = {**known, **bits.CHOICES, **metrics.CHOICES}
    with errors.field(f"{name}={given!r}"), errors.wrong_types():
        made = dict(
            zip(specs.texts(given), specs.values(given, metrics.CHOICES, name, inner), strict=True)
        )
        return {spec: _complete(spec, metric, default, pipeline) for spec, metric in made.items()}


def _complete(spec: str, metric: Metric, default: Network | None, pipeline: Any) -> Metric:
    if not metric.outputs:
        if pipeline is None:
            raise ValueError(f"{spec} is of a model, and there are only samples from a file")
        return metric
    chosen = metric.network or default
    if chosen is None:
        example = 'clip("FOLDER")' if "text" in metric.outputs else 'inception("FILE")'
        raise ValueError(
            f"{spec} needs a feature network: config.evaluation.features={example!r}, or as an "
            f"argument of the metrics that have one; there are {', '.join(networks.CHOICES)}"
        )
    if metric.only and chosen.name != metric.only:
        raise ValueError(f"{spec} is defined for the network {metric.only}, not {chosen.name}")
    for output in metric.outputs:
        if output not in chosen.outputs:
            raise unknown(f"{spec}: output of {chosen.name}", output, chosen.outputs)
    return replace(metric, network=chosen)
