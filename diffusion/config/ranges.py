"""The valid range of each numeric field of a config, independent of all other fields.

What depends on several fields, or on the data, is checked where these meet (``build``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from diffusion.runs.logging import wandb_installed


class Range(NamedTuple):
    """The numbers from ``low`` to ``high``; without ``low`` itself if ``above``."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False

    def holds(self, value: float) -> bool:
        lowest = self.low < value if self.above else self.low <= value
        return lowest and value <= self.high

    def requirement(self, value: float) -> str:
        """What is wrong with a value that is not in it: "must ..."."""
        if self.high <= 1:
            high = "1)" if self.high == BELOW_ONE else f"{self.high:g}]"
            return f"must lie in [{self.low:g}, {high}"
        if not math.isfinite(value):
            return "must be a finite number"
        if value > self.high:
            return f"must be at most {self.high:,}"
        return "must be positive" if self.low == 1 or self.above else f"must be >= {self.low:g}"


POSITIVE, NOT_NEGATIVE = Range(0, above=True), Range(0)
DEEP = Range(1, 10_000)  # more would keep the tracing busy for hours
BELOW_ONE = math.nextafter(1, 0)

RANGES = {
    "seed": Range(0, 2**32 - 1),
    "data.std": POSITIVE,
    "data.held_out": Range(0, BELOW_ONE),
    "data.tokens": Range(3, DEEP.high),  # start, one token, end
    "data.size": Range(0, DEEP.high),
    "data.padding": Range(0, DEEP.high),
    "data.scale": POSITIVE,
    "data.threads": Range(0, 1024),
    "data.workers": Range(0, 1024),
    "data.prefetch": Range(1, DEEP.high),
    "data.tag_dropout": Range(0, 1),
    "data.*": NOT_NEGATIVE,
    "model.*dropout": Range(0, BELOW_ONE),
    "model.*eps": POSITIVE,
    "model.*time_scale": POSITIVE,
    "model.*time_freq_shift": Range(),
    "model.*mlp_ratio": POSITIVE,
    "model.*mid_blocks": Range(0, DEEP.high),
    "model.*depth": DEEP,
    "model.*width": Range(1, 2**17),
    "model.*blocks": DEEP,
    "model.*attention": NOT_NEGATIVE,
    "model.tile": NOT_NEGATIVE,
    "model.*": Range(1),
    "objective.label_dropout": Range(0, 1),
    "objective.*": NOT_NEGATIVE,
    "autoencoding.discriminator.*": DEEP,
    "autoencoding.*": NOT_NEGATIVE,
    "optimizer.learning_rate": POSITIVE,
    "optimizer.b?": Range(0, BELOW_ONE),
    "optimizer.*": NOT_NEGATIVE,
    "train.*_every": NOT_NEGATIVE,
    "train.log_every": POSITIVE,
    "train.checkpoint_every": POSITIVE,
    "train.max_skipped": NOT_NEGATIVE,
    "train.keep_best": NOT_NEGATIVE,
    "train.snapshot_sigma_rel": POSITIVE,
    "train.steps": POSITIVE,
    "train.batch_size": POSITIVE,
    "train.accumulate": POSITIVE,
    "train.keep": POSITIVE,
    "train.validation_count": POSITIVE,
    "train.validation_samples": Range(2),
    "log.peak_tflops": NOT_NEGATIVE,
    "profile.steps": POSITIVE,
    "profile.warmup": NOT_NEGATIVE,
    "inspect.*": POSITIVE,
    "sampler.steps": Range(0, DEEP.high),
    "sampler.hand_over": Range(0, 1),
    "sampler.seed": Range(0, 2**32 - 1),
    "sampler.*": NOT_NEGATIVE,
    "samples.columns": DEEP,
    "samples.strength": Range(0, 1),
    "samples.labels": Range(),
    "samples.negative": Range(),
    "samples.aesthetic": Range(),
    "samples.*": NOT_NEGATIVE,
    "evaluation.count": NOT_NEGATIVE,
    "evaluation.shard": POSITIVE,
    "evaluation.part": NOT_NEGATIVE,
    "reference.examples": NOT_NEGATIVE,
    "sweep.*": POSITIVE,
    "learn.*": POSITIVE,
}
"""Of fields that are numbers, or several; an exact name counts before a pattern, and an earlier
pattern before a later one."""

ATTENTION = (None, "xla", "cudnn")


def check(config: ConfigDict) -> None:
    """Raises ValueError, naming the field, for the first one whose value is never possible."""
    for name, value in _fields(config):
        for number in _numbers(value):
            _check_number(name, value, number)
        if name.endswith(".attention_implementation") and value not in ATTENTION:
            raise ValueError(f"config.{name}={value!r}: expected one of None, 'xla', 'cudnn'")
        used = name.startswith(f"model.{config.model.name}.")
        if used and value == "cudnn" and jax.default_backend() != "gpu":
            raise ValueError(
                f"config.{name}='cudnn' needs an NVIDIA GPU, and this is a {jax.default_backend()}"
            )
    if len(config.data.background) != 3 or not all(
        isinstance(v, int) and 0 <= v <= 255 for v in config.data.background
    ):
        raise ValueError(
            f"config.data.background={config.data.background!r}: expected three whole numbers from "
            "0 to 255, red, green and blue"
        )
    if config.log.wandb and not wandb_installed():
        raise ValueError(
            f"config.log.wandb={config.log.wandb!r} needs Weights & Biases: pip install wandb"
        )


def _check_number(name: str, value: Any, number: float) -> None:
    allowed = RANGES.get(name) or next(
        (found for pattern, found in RANGES.items() if fnmatchcase(name, pattern)), Range()
    )
    if not math.isfinite(number) or not allowed.holds(number):
        raise ValueError(f"config.{name} {allowed.requirement(number)}, got {value!r}")


def _fields(config: ConfigDict, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name in config:
        value = config[name]
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _numbers(value: Any) -> Iterator[float]:
    """Those in a field, also where it holds one per level."""
    if isinstance(value, (tuple, list)):
        for entry in value:
            yield from _numbers(entry)
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield value
