"""Networks of other runs that guide a pipeline: a weaker model, a classifier of noised examples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from diffusion.denoiser import on_schedule
from diffusion.levels import Array, NoiseLevel
from diffusion.pipelines import description
from diffusion.pipelines.conditioners import Labels
from diffusion.pipelines.draw import Companion
from diffusion.pipelines.from_run import open_run
from diffusion.pipelines.pipeline import Pipeline
from diffusion.schedules import Schedule


@dataclass(frozen=True)
class Translated:
    """Parameters -> a network that sees x and level as its own schedule has them.

    Attributes:
      make: parameters -> network (x, level, ...).
      schedule: the network's; None: it is the sampler's.
    """

    make: Callable[[Any], Callable]
    schedule: Schedule | None

    def __call__(self, params: Any) -> Callable:
        """The network."""
        network = self.make(params)
        if self.schedule is None:
            return network

        def translated(x: Array, level: NoiseLevel, *cond: Any) -> Any:
            return network(*on_schedule(self.schedule, x, level), *cond)

        return translated


def weak(path: str, pipeline: Pipeline, schedule: str = "") -> Companion:
    """A weaker model of the same data, for autoguidance, from its workdir.

    ``schedule`` is the spec of the pipeline's; a run's of the same spec needs no translation.

    Raises:
      ValueError, FileNotFoundError: there is no such run, or it is one of other data.
    """
    run = open_run(path)
    if run.description.network not in description.DRAWN:
        raise ValueError(f"{path} holds a run of a {run.description.network}; expected a denoiser")
    other, own = run.pipeline, pipeline.conditioner
    _check_shape(path, other.shape, pipeline.shape)
    if other.conditioner.subject == "label":
        count, classes = other.conditioner.count, getattr(own, "count", 0)
        if own.subject != "label":
            raise ValueError(f"{path} is class-conditional, this model is not")
        if count != classes:
            raise ValueError(f"{path} knows {count} classes, this model {classes}")
    same = run.description.schedule == schedule
    return Companion(Translated(other.denoiser, None if same else other.schedule), run.load())


def classifier(path: str, pipeline: Pipeline, schedule: str = "") -> tuple[Companion, Labels]:
    """A classifier of noised examples, and the labels that it knows; arguments as ``weak``'s."""
    run = open_run(path)
    if run.description.network != "classifier":
        raise ValueError(
            f"{path} holds a run of a {run.description.network}; expected a classifier, such as "
            "configs/digits_classifier.py trains"
        )
    d = run.description
    _check_shape(path, d.shape, pipeline.shape)
    count = getattr(pipeline.conditioner, "count", d.num_classes)
    if count != d.num_classes:
        raise ValueError(f"{path} knows {d.num_classes} classes, this model {count}")
    judge = description.classification(d)
    same = d.schedule == schedule
    labels = Labels(d.num_classes, d.class_names, null=False)
    make = Translated(judge.classifier, None if same else judge.schedule)
    return Companion(make, run.load()), labels


def _check_shape(path: str, there: tuple[int, ...], here: tuple[int, ...]) -> None:
    if there != here:
        raise ValueError(f"{path} was trained on {there}, this model on {here}")
