"""From ``config.optimizer`` to the update of the parameters."""

from __future__ import annotations

from ml_collections import ConfigDict

from diffusion.config.errors import field
from diffusion.training import optimizers


def make(config: ConfigDict, steps: int) -> optimizers.Optimizer:
    """The optimiser of a run of so many steps.

    Raises:
      ValueError: a field of config.optimizer has an impossible value.
    """
    c = config.optimizer
    with field("config.optimizer"):
        return optimizers.make(
            c.name,
            c.learning_rate,
            warmup=c.warmup,
            decay=c.decay,
            decay_start=c.decay_start,
            steps=steps,
            b1=c.b1,
            b2=c.b2,
            eps=c.eps,
            weight_decay=c.weight_decay,
            clip_norm=c.clip_norm or None,
        )
