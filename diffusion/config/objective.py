"""From ``config.objective`` to what training minimises, without the networks of other runs."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
from ml_collections import ConfigDict

from diffusion import denoiser, predictions, schedules, specs
from diffusion.conditioning import null_like
from diffusion.config import consistency
from diffusion.config.errors import field, wrong_types
from diffusion.objectives import couplings, distances, times, weightings
from diffusion.objectives import noise as noises
from diffusion.objectives.classification import Classification
from diffusion.objectives.denoising import Denoising


def _schedule(text: str) -> schedules.Schedule:
    with field(f"config.objective.schedule={text!r}"), wrong_types():
        return specs.value(text, schedules.CHOICES, "config.objective.schedule")


def _shared(config: ConfigDict, schedule: schedules.Schedule) -> dict[str, Any]:
    """What all have that see noised examples: input scaling, c_noise, which levels."""
    c, at = config.objective, "config.objective"
    context = {"sigma_data": config.data.std, "schedule": schedule}
    steps = {"steps": schedule.steps} if isinstance(schedule, schedules.Table) else {}
    if not c.t_min < schedule.t_max:
        raise ValueError(f"{at}.t_min={c.t_min} must lie below the schedule's end {schedule.t_max}")
    return {
        "schedule": schedule,
        "prediction": specs.function(
            c.prediction, predictions.CHOICES, f"{at}.prediction", context
        ),
        "c_noise": _c_noise(c.c_noise, schedule),
        "times": specs.function(c.times, times.CHOICES, f"{at}.times", steps),
        "stratify": config.train.batch_size if c.stratified else None,
        "t_min": c.t_min,
    }


def classification(config: ConfigDict, network: nn.Module) -> Classification:
    """The objective of a classifier of noised examples."""
    _refuse_terms(config)
    return Classification(network=network, **_shared(config, _schedule(config.objective.schedule)))


def denoising(
    config: ConfigDict, network: nn.Module, nulls: dict[str, Any], shape: tuple[int, ...]
) -> Denoising:
    """The objective of a denoiser or a consistency model, without terms and teacher.

    Those want other networks or the data: ``terms.attach`` and ``consistency.attach`` add them.

    Args:
      config: the whole config.
      network: what is trained.
      nulls: fields of the null conditioning.
      shape: of an example.
    """
    c, at = config.objective, "config.objective"
    schedule = _schedule(c.schedule)
    context = {"sigma_data": config.data.std, "schedule": schedule}
    with field(f"{at}.noise={c.noise!r}"):
        noise = specs.value(c.noise, noises.CHOICES, f"{at}.noise")
    fields = {
        "network": network,
        **_shared(config, schedule),
        "weighting": specs.function(c.weighting, weightings.CHOICES, f"{at}.weighting", context),
        "distance": specs.function(c.distance, distances.CHOICES, f"{at}.distance"),
        "coupling": _coupling(config, bool(nulls.get("label")), shape),
        "null": partial(null_like, **nulls),
        "dropout": c.label_dropout if nulls else 0.0,
        "noise": noise,
    }
    return consistency.make(config, fields) if c.name == "consistency" else Denoising(**fields)


def term_specs(config: ConfigDict) -> list[str]:
    """The texts of config.objective.terms, which is one text or several."""
    given = specs.texts(config.objective.terms)
    if not all(isinstance(text, str) for text in given):
        raise ValueError(
            f"config.objective.terms={config.objective.terms!r}: expected texts such as "
            "'uncertainty()' or ('variational_bound(weight=1e-3)', 'uncertainty()')"
        )
    return given


def learns_variance(config: ConfigDict) -> bool:
    """Whether the network gives variances too, in twice the channels."""
    return any(name_of(text) == "variational_bound" for text in term_specs(config))


def name_of(text: str) -> str:
    """The function that a spec names."""
    return text.partition("(")[0].strip()


def _refuse_terms(config: ConfigDict) -> None:
    if term_specs(config):
        raise ValueError(
            f"config.objective.terms={config.objective.terms!r} change the loss of "
            f"config.objective.name='denoising', not of {config.objective.name!r}"
        )


def _coupling(config: ConfigDict, labels: bool, shape: tuple[int, ...]) -> couplings.Coupling:
    """That of config.objective, by default within what a device takes at once."""
    name, text = "config.objective.coupling", config.objective.coupling
    size = config.train.batch_size // (jax.device_count() * config.train.accumulate)
    coupling = specs.function(text, couplings.CHOICES, name, {"group": size})
    if coupling is not couplings.independent and learns_variance(config):
        raise ValueError(
            f"{name}={text!r}: the variational_bound in config.objective.terms takes noise to be "
            "independent of the data"
        )
    x, label = (jax.ShapeDtypeStruct(s, d) for s, d in (((size, *shape), "f4"), ((size,), "i4")))
    with field(f"{name}={text!r}"):
        jax.eval_shape(lambda x, y: coupling(x, lambda _: x, y), x, label if labels else None)
    return coupling


def _c_noise(text: str, schedule: schedules.Schedule) -> Any:
    """How the network is told the time; "auto" is the custom of each schedule's models."""
    if text == "auto":
        if isinstance(schedule, schedules.Table):
            text = "ddpm_index"
        elif isinstance(schedule, (schedules.EDM, schedules.VE)):
            text = "log_sigma"
        else:
            text = "thousand_t"
    context = {"steps": schedule.steps} if isinstance(schedule, schedules.Table) else {}
    return specs.function(text, denoiser.C_NOISE, "config.objective.c_noise", context)
