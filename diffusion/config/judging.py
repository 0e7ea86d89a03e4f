"""From ``config.evaluation`` and ``config.data`` to what judges samples."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.config.data import make_source
from diffusion.data.sources import Source, subset
from diffusion.errors import field
from diffusion.evaluation import networks, selection
from diffusion.evaluation.harness import Harness
from diffusion.evaluation.metrics.metric import Data
from diffusion.evaluation.networks.network import Network
from diffusion.pipelines import judges
from diffusion.specs import unknown

METRICS = "config.evaluation.metrics"
NETWORKS = networks.CHOICES | {"classifier": judges.classifier}
ENDS = 64  # values of an array


def data(config: ConfigDict) -> Data:
    """The real examples of config.data; see ``split``."""
    return split(config, *(make_source(config.data, name) for name in ("train", "test")))


def split(config: ConfigDict, train: Source, held_out: Source) -> Data:
    """Real examples; where training chooses by metrics, half of the held-out ones are for that.

    They are every second one. The others judge, and have had no part in a choice.
    """
    if not config.train.validation_metrics:
        return Data(train, held_out)
    validation, test = (subset(held_out, np.arange(k, len(held_out), 2)) for k in (0, 1))
    return Data(train, test, validation)


def network(config: ConfigDict) -> Network | None:
    """``config.evaluation.features``, the network of metrics that name none."""
    return selection.network(config.evaluation.features, "config.evaluation.features", NETWORKS)


def make(
    config: ConfigDict,
    pipeline: Any,
    data: Callable[[], Data] | None,
    metrics: Any = None,
    name: str = METRICS,
    reference: str = "",
) -> Harness:
    """What judges samples by ``config.evaluation``, or by other metrics and real examples.

    Raises:
      ValueError: for impossible fields; the message names them.
    """
    c = config.evaluation
    default = network(config)
    given = c.metrics if metrics is None else metrics
    chosen = selection.make(given, pipeline, name, default, NETWORKS)
    made = Harness(chosen, pipeline, data, reference or c.reference)
    with field(f"config.evaluation.reference={made.reference!r}"):
        made.check_references()
    return made


def check(config: ConfigDict) -> None:
    """Raises ValueError for an impossible ``evaluation.part`` or ``evaluation.keep``."""
    part, keep = config.evaluation.part, config.evaluation.keep
    if len(part) != 2 or not 0 <= part[0] < part[1]:
        raise ValueError(
            f"config.evaluation.part={part!r}: expected (i, n), the i-th of n parts from 0, as in "
            "(0, 4)"
        )
    if keep not in ("", "features", "samples"):
        raise unknown("config.evaluation.keep", keep, ("features", "samples", "''"))


def fingerprint(params: Any) -> str:
    """16 hexadecimal digits that differ for other parameters, by the ends of each array."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        flat = leaf.reshape(-1)
        ends = np.concatenate([np.asarray(flat[:ENDS]), np.asarray(flat[-ENDS:])])
        digest.update(f"{path}{leaf.shape}{leaf.dtype}".encode() + ends.tobytes())
    return digest.hexdigest()[:16]
