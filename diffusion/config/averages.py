"""Which of a run's parameters are sampled from: ``config.sampler.average`` and ``.checkpoint``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from diffusion import ema, specs
from diffusion.config.errors import field
from diffusion.runs import posthoc, restore

FIELD, CHECKPOINT = "config.sampler.average", "config.sampler.checkpoint"
WORTH_A_WARNING = 0.1  # relative residual; on random walks errors of a few per cent


def parameters(config: ConfigDict, workdir: str) -> tuple[Any, int, str]:
    """The parameters, the training step that they are from, and what to call them.

    Raises:
      ValueError: a field has an impossible value, or what it names is damaged.
      FileNotFoundError: there is no such checkpoint, or there are no snapshots.
    """
    make, step = check(config), config.sampler.checkpoint
    if step == "best":
        with field(f"{CHECKPOINT}='best'"):
            step = restore.choose(workdir, step, "params").name
    step = step if step == "newest" else int(step)
    with field(f"{FIELD}={config.sampler.average!r}"):
        return make(workdir=workdir, step=step)


def check(config: ConfigDict) -> Callable:
    """What ``sampler.average`` names; raises ValueError where it or ``checkpoint`` is wrong."""
    c = config.sampler
    if c.checkpoint not in ("newest", "best") and not c.checkpoint.isdigit():
        raise ValueError(f"{CHECKPOINT} must be newest, best or a step, got {c.checkpoint!r}")
    return specs.function(c.average, AVERAGES, FIELD, filled=("workdir", "step"))


def _kept(name: str, called: str) -> Callable:
    def read(workdir: str, step: int | str) -> tuple[Any, int, str]:
        params, found = restore.restore_ema(workdir, name, step=step)
        return params, found, f"{called} parameters after step {found}"

    return read


def _posthoc(workdir: str, step: int | str, sigma_rel: float) -> tuple[Any, int, str]:
    return _mixed(workdir, step, sigma_rel, f"sigma_rel={sigma_rel:g}")


def _posthoc_constant(workdir: str, step: int | str, decay: float) -> tuple[Any, int, str]:
    return _mixed(workdir, step, ema.constant(decay), f"decay={decay:g}")


def _mixed(workdir: str, step: int | str, wanted: Any, called: str) -> tuple[Any, int, str]:
    params, how = posthoc.reconstruct(workdir, wanted, None if step == "newest" else step)
    text = (
        f"parameters averaged after the fact with {called} up to step {how.step}, from "
        f"{how.snapshots} snapshots; the profile's relative residual is {how.residual:.1e}"
    )
    if how.residual > WORTH_A_WARNING:
        text += " (large: better at a step with a snapshot, or from more snapshots)"
    return params, how.step, text


AVERAGES = {
    "ema": _kept("ema", "averaged"),
    "params": _kept("params", "trained"),
    "posthoc": _posthoc,
    "posthoc_constant": _posthoc_constant,
}
