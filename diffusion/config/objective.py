"""From ``config.objective`` to what training minimises, without the networks of other runs."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from diffusion import specs
from diffusion.conditioning import Conditioning, null_like
from diffusion.config import few_steps
from diffusion.errors import field, wrong_types
from diffusion.objectives import couplings, distances, times, weightings
from diffusion.objectives import dropout as dropouts
from diffusion.objectives import noise as noises
from diffusion.objectives.classification import Classification
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.dropout import Dropout
from diffusion.pipelines.pipeline import Pipeline
from diffusion.pipelines.samplers import FAINT, MOSTLY
from diffusion.schedules import EDM, Schedule, Table

AT = "config.objective."


def _shared(config: ConfigDict, pipeline: Pipeline) -> dict[str, Any]:
    """What all have that see noised examples: the model, and which levels."""
    c, at, schedule = config.objective, "config.objective", pipeline.schedule
    steps = {"steps": schedule.steps} if isinstance(schedule, Table) else {}
    if not c.t_min < schedule.t_max:
        raise ValueError(f"{at}.t_min={c.t_min} must lie below the schedule's end {schedule.t_max}")
    return {
        "network": pipeline.network,
        "schedule": schedule,
        "prediction": pipeline.prediction,
        "c_noise": pipeline.c_noise,
        "times": _times(c.times, schedule, steps),
        "stratify": config.train.batch_size if c.stratified else None,
        "t_min": c.t_min,
    }


def _times(text: str, schedule: Schedule, steps: dict[str, int]) -> times.TimeDistribution:
    if text == "auto":
        text = "log_normal" if isinstance(schedule, EDM) else "uniform"
    distribution = specs.function(text, times.CHOICES, AT + "times", steps)
    with field(f"{AT}times={text!r}"), wrong_types():
        distribution(jnp.array([0.25, 0.75]), schedule)  # its options are checked in the call
    return distribution


def _distance(text: str) -> distances.Distance:
    distance = specs.function(text, distances.CHOICES, AT + "distance")
    with field(f"{AT}distance={text!r}"), wrong_types():
        distance(jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    return distance


def _weighting(config: ConfigDict, pipeline: Pipeline) -> weightings.Weighting:
    """That of the config, whose factors must be finite at both ends, and not 0 everywhere."""
    c, schedule = config.objective, pipeline.schedule
    context = {"sigma_data": config.data.std, "schedule": schedule}
    weighting = specs.function(c.weighting, weightings.CHOICES, AT + "weighting", context)
    shares = jnp.array([max(c.t_min / schedule.t_max, 1e-5), 1, 0.01, 0.3, 0.7])
    with field(f"{AT}weighting={c.weighting!r}"), wrong_types():
        levels = schedule(shares * schedule.t_max)
        found = weightings.weights(weighting, pipeline.prediction, levels)
        if not jnp.any(found > 1 / weightings.INFINITE):
            raise ValueError("its weights are 0 at all times: nothing would be learned")
        for end, weight in zip(("least", "most"), found):
            if not weight < weightings.INFINITE:
                raise ValueError(
                    f"the weight is infinite where there is {end} noise, with {AT}prediction="
                    f"{c.prediction!r} on {AT}schedule={c.schedule!r}; v is finite there"
                )
    return weighting


def check(config: ConfigDict) -> None:
    """Raises ValueError for terms or a teacher of an objective that has none."""
    name = config.objective.name
    if term_specs(config) and name != "denoising":
        raise ValueError(
            f"config.objective.terms={config.objective.terms!r} change the loss of "
            f"config.objective.name='denoising', not of {name!r}"
        )
    few_steps.check(config)


def classification(config: ConfigDict, pipeline: Pipeline) -> Classification:
    """The objective of a classifier of noised examples."""
    return Classification(**_shared(config, pipeline))


def denoising(
    config: ConfigDict, pipeline: Pipeline, nulls: dict[str, Any], shape: tuple[int, ...]
) -> Denoising:
    """The objective of a denoiser or of a student of few steps, without terms and teacher.

    Those need other networks or the data: ``terms.attach`` and ``teachers.attach`` add them.
    ``nulls`` are fields of the null conditioning (see ``null_like``), ``shape`` is that of an
    example.
    """
    c, at = config.objective, "config.objective"
    with field(f"{at}.noise={c.noise!r}"), wrong_types():
        noise = specs.value(c.noise, noises.CHOICES, f"{at}.noise")
    fields = {
        **_shared(config, pipeline),
        "weighting": _weighting(config, pipeline),
        "distance": _distance(c.distance),
        "coupling": _coupling(config, "label" in nulls, shape),
        "null": partial(null_like, **nulls),
        "dropout": dropout(config, nulls),
        "noise": noise,
    }
    return few_steps.make(config, fields) if c.name == few_steps.NAME else Denoising(**fields)


def dropout(config: ConfigDict, nulls: Collection[str]) -> Dropout | None:
    """Which signals of which examples are null in training, of those that have a null; or None."""
    pictures = {"instruct": "image", "image_prompt": "image_features"}
    usual = next((kind for kind, signal in pictures.items() if signal in nulls), "together")
    made, text = _dropout(config, usual), config.objective.dropout
    with field(f"{AT}dropout={text!r}"), wrong_types():
        made(Conditioning(), Conditioning(), jnp.zeros(1))  # its options are checked in the call
        signal = pictures.get(name_of(text), "")
        if signal and signal not in nulls:
            raise ValueError(f"it drops pictures, and the data have no {signal}")
    return made if nulls and made.keywords["rate"] > 0 else None


def drops_text(config: ConfigDict) -> bool:
    """Whether some examples are trained without label or caption."""
    return _dropout(config).keywords["rate"] > 0


def _dropout(config: ConfigDict, usual: str = "together") -> partial:
    c = config.objective
    text, context = usual if c.dropout == "auto" else c.dropout, {"rate": c.label_dropout}
    filled = ("cond", "null", "u")
    return specs.function(text, dropouts.CHOICES, AT + "dropout", context, filled)


def notes(config: ConfigDict, pipeline: Pipeline, objective: Denoising) -> list[str]:
    """What is odd about the times trained on, if anything."""
    u, c = (jnp.arange(100) + 0.5) / 100, config.objective
    level = times.levels(u, objective.times, pipeline.schedule, c.t_min)
    strong = float(jnp.mean(level.sigma > FAINT * level.alpha))
    if strong <= MOSTLY:
        return []
    return [
        f"{AT}times={c.times!r} on {AT}schedule={c.schedule!r}: {strong:.0%} of training is at "
        f"sigma / alpha > {FAINT:g}, where little of the data is left; auto sees all noise levels"
    ]


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
    with field(f"{name}={text!r}"), wrong_types():
        jax.eval_shape(lambda x, y: coupling(x, lambda _: x, y), x, label if labels else None)
    return coupling
