"""From ``config.optimizer`` to the update of the parameters."""

from __future__ import annotations

from ml_collections import ConfigDict

from diffusion.errors import field
from diffusion.training import optimizers


def make(config: ConfigDict, steps: int) -> optimizers.Optimizer:
    """The optimiser of a run of so many steps.

    Raises:
      ValueError: a field of config.optimizer has an impossible value.
    """
    options = config.optimizer.to_dict() | {"clip_norm": config.optimizer.clip_norm or None}
    with field("config.optimizer"):
        return optimizers.make(steps=steps, **options)


def notes(config: ConfigDict) -> list[str]:
    """What is odd about the learning rates of a run."""
    warmup, steps = config.optimizer.warmup, config.train.steps
    if warmup <= steps:
        return []
    last = make(config, steps).learning_rate(steps - 1)
    return [
        f"config.optimizer.warmup={warmup} is longer than config.train.steps={steps}: the "
        f"learning rate ends at {last:.3g}, below config.optimizer.learning_rate"
    ]


def resumption_notes(config: ConfigDict, before: ConfigDict, done: int) -> list[str]:
    """What is odd where a run goes on that took ``done`` steps with the config ``before``."""
    steps = config.train.steps
    old = float(make(before, before.train.steps).learning_rate(done))
    new = float(make(config, steps).learning_rate(done))
    if not done < steps or new <= 1.1 * old:
        return []
    return [
        f"the learning rate, {old:.3g} after {done} steps, rises to {new:.3g}, by config.optimizer "
        f"(decay={config.optimizer.decay!r}) and config.train.steps={steps}"
    ]
