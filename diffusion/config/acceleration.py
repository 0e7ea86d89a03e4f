"""From ``config.sampler.acceleration`` to what makes evaluations cheaper."""

from __future__ import annotations

from collections.abc import Mapping

import flax.linen as nn
from ml_collections import ConfigDict

from diffusion import specs
from diffusion.config.errors import field, wrong_types
from diffusion.models import reuse, token_merging
from diffusion.sampling import acceleration, feature_cache
from diffusion.sampling.acceleration import Acceleration

FIELD = "config.sampler.acceleration"


def make(config: ConfigDict, networks: Mapping[str, nn.Module], evaluations: int) -> Acceleration:
    """The acceleration of a config.

    Args:
      config: of training or of --mode=generate.
      networks: those that an evaluation calls, by what errors call them ("" is the model).
      evaluations: of the sampler, to check schedules with.

    Raises:
      ValueError: for impossible settings; the message names the field.
    """
    given = config.sampler.acceleration
    with field(f"{FIELD}={given!r}"), wrong_types():
        parts = specs.values(given, acceleration.CHOICES, FIELD, feature_cache.CHOICES)
        made = acceleration.accelerate(*parts)
        made.at(evaluations)  # finds mistakes in time
    for name, network in networks.items():
        with field(f"{FIELD}={given!r}{name and f', {name}'}"):
            if made.cache is not None:
                reuse.check(network, made.keep)
            if made.merge:
                token_merging.check(network)
    return made


def notes(made: Acceleration, network: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Which settings have no effect. ``shape`` is that of the data."""
    if not made.merge:
        return []
    most = token_merging.most_tokens(network, shape)
    if most >= made.at_least:
        return []
    return [
        f"{FIELD}: merge_tokens({made.merge}) has no effect: the model's largest attention has "
        f"{most} tokens, at_least={made.at_least}"
    ]
