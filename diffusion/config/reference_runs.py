"""Networks of other runs that a config names: what guides this one, what it is aligned to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from configs import base
from diffusion.conditioning import Conditioning
from diffusion.denoiser import on_schedule
from diffusion.levels import Array, NoiseLevel
from diffusion.objectives.classification import Classification
from diffusion.objectives.denoising import Denoising
from diffusion.runs import restore
from diffusion.runs import workdir as workdirs


@dataclasses.dataclass(frozen=True)
class Run:
    """Another run's network, and where its parameters are."""

    directory: str
    objective: Any
    num_classes: int
    shape: tuple[int, ...]
    same_schedule: bool

    def params(self) -> Any:
        """Its averaged parameters after the newest checkpoint's step."""
        return restore.restore_ema(self.directory, "ema")[0]


def opened(
    directory: str,
    name: str,
    config: ConfigDict,
    kind: type,
    num_classes: int,
    shape: tuple[int, ...],
    load: Callable,
) -> Run:
    """Another run, in the workdir that the field ``name`` gives; the rest as for ``make``.

    Raises:
      ValueError: it is none, of another kind, or of other data.
    """
    field = f"{name}={directory!r}"
    path = Path(directory)
    if not (path / workdirs.CONFIG).exists() or not workdirs.steps(path):
        raise ValueError(f"{field} is not the workdir of a run with a checkpoint")
    other = ConfigDict(tuples(workdirs.read_config(path, base.get_config().to_dict())))
    try:
        objective, classes, its_shape = load(other)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    if not isinstance(objective, kind):
        wanted = "configs/digits_classifier.py" if kind is Classification else "configs/digits.py"
        raise ValueError(
            f"{field} holds a run of {type(objective).__name__.lower()}; "
            f"expected {kind.__name__.lower()}, such as {wanted}"
        )
    if its_shape != shape:
        raise ValueError(f"{field} was trained on {its_shape}, this model on {shape}")
    if num_classes and classes and classes != num_classes:
        raise ValueError(f"{field} knows {classes} classes, this model {num_classes}")
    if kind is Denoising and classes and not num_classes:
        raise ValueError(f"{field} is class-conditional, this model is not")
    same = other.objective.schedule == config.objective.schedule
    return Run(directory, objective, classes, its_shape, same)


def at_its_levels(network: Callable, run: Run) -> Callable:
    """``network``, called with the sampler's x and level, sees those of its own schedule."""
    if run.same_schedule:
        return network

    def translated(x: Array, level: NoiseLevel, *cond: Conditioning) -> Any:
        return network(*on_schedule(run.objective.schedule, x, level), *cond)

    return translated


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: tuples(entry) for name, entry in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value
