"""From ``config.consistency`` to a consistency model, and to its teacher, another run."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from diffusion import specs
from diffusion.errors import field
from diffusion.objectives import consistency
from diffusion.objectives.consistency import Consistency
from diffusion.objectives.denoising import Denoising
from diffusion.pipelines import companions
from diffusion.pipelines.pipeline import Pipeline

TARGETS = ("ema", "params")
UNUSED = {"weighting": "simple", "coupling": "independent"}


def make(config: ConfigDict, fields: dict[str, Any]) -> Consistency:
    """The objective, of the fields that any denoiser has, without a teacher.

    Raises:
      ValueError: a field has an impossible value, or one that a consistency model cannot use.
    """
    c, at = config.consistency, "config.consistency"
    if c.target not in TARGETS:
        raise specs.unknown(f"{at}.target", c.target, TARGETS)
    for name, none in UNUSED.items():
        if config.objective[name] != none:
            raise ValueError(
                f"config.objective.{name}={config.objective[name]!r} has no part in "
                f"config.objective.name='consistency'; leave it at {none!r}"
            )
    if config.objective.prediction == "x0":
        raise ValueError(
            "config.objective.prediction='x0' does not give x back where there is no noise, as a "
            "consistency function must; choose v, flow, edm or eps"
        )
    solver = specs.function(c.solver, consistency.SOLVERS, f"{at}.solver")
    return Consistency(**fields, nodes=c.nodes, solver=solver, target=c.target)


def attach(
    config: ConfigDict, objective: Denoising, pipeline: Pipeline
) -> tuple[Denoising, dict[str, Any]]:
    """The objective of a pipeline with its teacher, and the teacher's averaged parameters.

    Raises:
      ValueError: the teacher is not the workdir of a denoiser of such data.
    """
    path = config.consistency.teacher
    if not path:
        return objective, {}
    with field(f"config.consistency.teacher={path!r}"):
        teacher = companions.weak(path, pipeline, config.objective.schedule)
    return dataclasses.replace(objective, teacher=teacher.network), {"teacher": teacher.params}
