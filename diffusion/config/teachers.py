"""The networks that a student of few steps learns from: a teacher, and what critics look at."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from diffusion.config import critics, teacher_pairs
from diffusion.config.few_steps import AT, BASE, NAME
from diffusion.data.sources import Source
from diffusion.errors import field
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.few_steps.student import TEACHER
from diffusion.pipelines import companions
from diffusion.pipelines.from_run import open_run
from diffusion.pipelines.pipeline import Pipeline


def attach(
    config: ConfigDict, objective: Denoising, pipeline: Pipeline, train: Source, base: Any = None
) -> tuple[Denoising, Source, dict[str, Any]]:
    """The objective of a pipeline with its teacher and what its critics look at, the data, which
    may be the teacher's samples, and the frozen parameters of these networks.

    ``base`` are the parameters beside an adapter.

    Raises:
      ValueError: the teacher is not a denoiser of such data, or critics cannot see its features.
    """
    if config.objective.name != NAME:
        return objective, train, {}
    path, frozen = config.few_steps.teacher, {}
    if objective.method.teacher == "pairs":
        with field(f"{AT}teacher={path!r}"):
            companions.weak(path, pipeline, config.objective.schedule)
            teacher = open_run(path)
        low, _ = objective.guidance
        return objective, teacher_pairs.source(config, objective.method, low, teacher, train), {}
    if path == BASE:
        objective = dataclasses.replace(objective, teacher=objective.denoiser)
    elif path:
        with field(f"{AT}teacher={path!r}"):
            found = companions.weak(path, pipeline, config.objective.schedule)
        frozen = {TEACHER: found.params}
        objective = dataclasses.replace(objective, teacher=found.network)
    with field(f"{AT}method={config.few_steps.method!r}"):
        objective, frozen = critics.attach(config, objective, pipeline, frozen, base)
    return objective, train, frozen
