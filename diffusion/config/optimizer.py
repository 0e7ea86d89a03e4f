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
