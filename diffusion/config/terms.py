"""From ``config.objective.terms`` to the terms of the denoising loss."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from diffusion import specs
from diffusion.config import alignment
from diffusion.config.objective import name_of, term_specs
from diffusion.data.sources import Source
from diffusion.errors import field, wrong_types
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.terms.prior import PriorPreservation
from diffusion.objectives.terms.uncertainty import Uncertainty
from diffusion.objectives.terms.variance import VariationalBound
from diffusion.schedules import Table

FIELD = "config.objective.terms"


def _variational_bound(weight: float = 1e-3, *, setting: alignment.Setting) -> VariationalBound:
    c, schedule = setting.config.objective, setting.objective.schedule
    if not isinstance(schedule, Table) or name_of(c.times) != "discrete":
        raise ValueError(
            "it bounds a chain of discrete steps: it needs a table schedule (linear, "
            "scaled_linear, cosine, sigmoid) and times='discrete', got "
            f"schedule={c.schedule!r}, times={c.times!r}"
        )
    steps = setting.objective.times.keywords["steps"]
    if steps != schedule.steps:
        raise ValueError(
            f"times={c.times!r} must be the schedule's {schedule.steps} steps: times='discrete'"
        )
    return VariationalBound(schedule, weight, schedule.steps, setting.train.levels or 256)


def _prior_preservation(weight: float = 1.0, *, setting: alignment.Setting) -> PriorPreservation:
    if not setting.train.shares:
        raise ValueError(
            "it needs pictures of the subject's class: config.data.name='subject' with "
            "config.data.subject.class_dir and class_prompt"
        )
    return PriorPreservation(weight)


TERMS: dict[str, Callable] = {
    "uncertainty": Uncertainty,
    "variational_bound": _variational_bound,
    "alignment": alignment.make,
    "prior_preservation": _prior_preservation,
}
TRAINING = ("alignment",)  # those that only training needs, with their encoders


def attach(
    config: ConfigDict, objective: Denoising, train: Source
) -> tuple[Denoising, Source, dict[str, Any]]:
    """The objective with its terms, the data with what these need, and their frozen parameters.

    Raises:
      ValueError: a term is unknown or named twice, or does not fit; the message names the field.
    """
    terms, frozen = {}, {}
    for text in term_specs(config):
        setting = alignment.Setting(config, objective, train)
        with field(f"{FIELD}={text!r}"), wrong_types():
            make = specs.function(text, TERMS, FIELD, {"setting": setting}, filled=("setting",))
            term = make()
            if name_of(text) in TRAINING:
                term, train, frozen[name_of(text)] = term
            if term.name in terms:
                raise ValueError(f"there are two terms {term.name}; each may stand once")
        terms[term.name] = term
    if train.shares and PriorPreservation.name not in terms:
        raise ValueError(
            f"{FIELD}={config.objective.terms!r}: the data have pictures of the subject's class "
            "(config.data.subject.class_dir), which need 'prior_preservation(weight=1.0)'"
        )
    if terms:
        objective = dataclasses.replace(objective, terms=tuple(terms.values()))
    return objective, train, frozen
