"""From ``config.few_steps`` to a student; ``teachers`` adds the networks that it learns from."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from diffusion import specs
from diffusion.errors import check_range, field, wrong_types
from diffusion.models.surroundings import image_network
from diffusion.objectives.few_steps import pairs
from diffusion.objectives.few_steps.adversary import Adversarial, latent_adversarial
from diffusion.objectives.few_steps.critics import CHOICES as FEATURES
from diffusion.objectives.few_steps.drifting import Drifting
from diffusion.objectives.few_steps.flash import Flash
from diffusion.objectives.few_steps.matching import DistributionMatching, ScoreIdentity
from diffusion.objectives.few_steps.reflow import Reflow
from diffusion.objectives.few_steps.regression import Consistency, GuidanceDistillation, Progressive
from diffusion.objectives.few_steps.shortcut import Shortcut
from diffusion.objectives.few_steps.student import Method, Student
from diffusion.objectives.few_steps.tangents import Continuous, MeanFlow

NAME = "few_steps"
AT = "config.few_steps."
BASE = "base"
"""A teacher's name: the model that an adapter is trained beside."""
UNUSED = {"weighting": "simple", "coupling": "independent"}
METHODS = {
    "adversarial": Adversarial,
    "consistency": Consistency,
    "continuous": Continuous,
    "distribution_matching": DistributionMatching,
    "drifting": Drifting,
    "flash": Flash,
    "guidance_distillation": GuidanceDistillation,
    "latent_adversarial": latent_adversarial,
    "mean_flow": MeanFlow,
    "progressive": Progressive,
    "reflow": Reflow,
    "score_identity": ScoreIdentity,
    "shortcut": Shortcut,
}


def method(config: ConfigDict) -> Method | None:
    """How a student learns; None for another objective."""
    if config.objective.name != NAME:
        return None
    text = config.few_steps.method
    with field(f"{AT}method={text!r}"), wrong_types():
        return specs.value(text, METHODS, f"{AT}method", pairs.CHOICES | FEATURES)


def check(config: ConfigDict) -> None:
    """Raises ValueError for a teacher or guidance that nothing learns from."""
    c, name = config.few_steps, config.objective.name
    if name != NAME:
        for key in ("teacher", "guidance"):
            if c[key]:
                raise ValueError(
                    f"{AT}{key}={c[key]!r} is for config.objective.name={NAME!r}, not {name!r}"
                )
        return
    made = method(config)
    if made.teacher in ("needed", "pairs") and not c.teacher:
        raise ValueError(f"{AT}method={c.method!r} needs a teacher: {AT}teacher, a run's workdir")
    if made.teacher == "unused" and c.teacher:
        raise ValueError(f"{AT}method={c.method!r} learns from the data, not from {AT}teacher")
    if c.teacher == BASE and not config.objective.adapter:
        raise ValueError(
            f"{AT}teacher='base' is the model beside an adapter (config.objective.adapter), and "
            "there is none; expected a run's workdir"
        )
    low, high = guidance(config)
    if made.teacher == "pairs" and (low != high or c.teacher == BASE):
        raise ValueError(
            f"{AT}method={c.method!r} draws pairs of a run ({AT}teacher) with one scale of guidance"
            f"; got {AT}guidance={c.guidance!r} and {AT}teacher={c.teacher!r}"
        )
    if (low, high) != (1, 1) and not c.teacher:
        raise ValueError(f"{AT}guidance={c.guidance!r} is of a teacher ({AT}teacher), which is ''")


def guidance(config: ConfigDict) -> tuple[float, float]:
    """The lowest and the highest scale of the teacher's guidance; (1, 1): none."""
    given = config.few_steps.guidance
    if given == () or given == "":
        return 1.0, 1.0
    both = tuple(given) if isinstance(given, tuple | list) else (given, given)
    with field(f"{AT}guidance={given!r}"), wrong_types():
        if len(both) != 2 or any(isinstance(s, bool | str) for s in both):
            raise ValueError("expected one scale, such as 7.5, or the lowest and the highest")
        check_range("the lowest scale", both[0], 0, 1000)
        check_range("the highest scale", both[1], both[0], 1000)
    return float(both[0]), float(both[1])


def make(config: ConfigDict, fields: dict[str, Any]) -> Student:
    """The objective, of the fields that any denoiser has, without a teacher.

    Raises:
      ValueError: a field has an impossible value, or one that a student cannot use.
    """
    made = method(config)
    for name, none in UNUSED.items():
        if config.objective[name] != none:
            raise ValueError(
                f"config.objective.{name}={config.objective[name]!r} has no part in "
                f"config.objective.name={NAME!r}; leave it at {none!r}"
            )
    if config.objective.prediction == "x0":
        raise ValueError(
            "config.objective.prediction='x0' does not give x back where there is no noise, as "
            "networks of few steps must; choose v, flow, edm or eps"
        )
    embeds = getattr(image_network(fields["network"]), "guidance_width", None) is not None
    scales = guidance(config)
    if embeds and not config.few_steps.teacher:
        raise ValueError(
            f"config.model.{config.model.name}.guidance_width is for the scale of a teacher's "
            f"guidance ({AT}guidance), and there is no {AT}teacher"
        )
    if isinstance(made, GuidanceDistillation) and (not embeds or scales == (1, 1)):
        raise ValueError(
            f"{AT}method={config.few_steps.method!r}: a student is told the scale of guidance; "
            f"set config.model.{config.model.name}.guidance_width, such as 256, and {AT}guidance, "
            "such as (1.0, 8.0)"
        )
    return Student(
        **fields,
        method=made,
        guidance=scales,
        embeds_guidance=embeds,
        std=config.data.std,
    )
