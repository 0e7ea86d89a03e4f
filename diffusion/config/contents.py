"""From ``config.samples`` to what samples are of."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffusion.evaluation.metrics.metric import Samples
from diffusion.pipelines.conditioners import Subject
from diffusion.pipelines.drawer import Drawer
from diffusion.pipelines.pipeline import Params
from diffusion.sampling.tables import Solver


def subjects(config: ConfigDict) -> list[Subject]:
    """What config.samples asks for: prompts, captions or labels; none if nothing is given."""
    c = config.samples
    labelled = c.labels not in ((), "")
    if c.prompt and labelled:
        raise ValueError("config.samples.prompt and config.samples.labels: give one of the two")
    given = c.labels if labelled or c.prompt is None else c.prompt
    if given == "" and c.prompt is None:
        return []
    if isinstance(given, str) and given.startswith("@"):
        path = Path(given[1:])
        if not path.is_file():
            raise FileNotFoundError(f"config.samples.prompt={given!r}: there is no such file")
        return [line.strip() for line in path.read_text().splitlines() if line.strip()]
    return list(given) if isinstance(given, (tuple, list)) else [given]


def negative(config: ConfigDict) -> Subject | None:
    """What config.samples steers away from; None: what stands for none."""
    given = config.samples.negative
    return None if given == "" else given


def in_turn(config: ConfigDict, drawer: Drawer, captions: Sequence[str] = ()) -> list[Subject]:
    """The subjects that samples have in turn: those of config.samples, or the model's own.

    A model of texts takes ``captions``, if there are any, instead of its own.

    Raises:
      ValueError: a model of texts has none of its own, and none are given.
    """
    given, conditioner = subjects(config), drawer.pipeline.conditioner
    if not given and conditioner.subject == "text":
        given = captions or conditioner.suggestions
        if not given:
            raise ValueError("config.samples.prompt is not given: say what should be drawn")
    return list(given or conditioner.suggestions)


def samples(
    config: ConfigDict,
    drawer: Drawer,
    params: Params,
    count: int,
    captions: Sequence[str] = (),
    solver: Solver | None = None,
) -> Samples:
    """``count`` samples as the data are, by the drawer's table or another; see ``in_turn``."""
    subjects = drawer.subjects(count, in_turn(config, drawer, captions))

    def draw(first: int, end: int) -> np.ndarray:
        own = subjects[first:end]
        x = drawer.draw(params, own, negative(config), solver=solver, first=first)
        return drawer.pipeline.codec.decode_all(params, x)

    return Samples(count, draw, subjects)
