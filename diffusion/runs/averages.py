"""Which of a run's parameters are drawn from: an average, after a checkpoint's step."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from diffusion import ema, specs
from diffusion.errors import field
from diffusion.runs import posthoc, restore

WORTH_A_WARNING = 0.1  # relative residual; on random walks errors of a few per cent


def parameters(
    workdir: str | os.PathLike, average: str = "ema", checkpoint: str = "newest"
) -> tuple[Any, int, str]:
    """The parameters, the training step that they are from, and what to call them.

    ``average`` is a spec of ``CHOICES``, ``checkpoint`` "newest", "best" or the number of a step.
    """
    make, step = check(average, checkpoint), checkpoint
    if step == "best":
        step = restore.choose(workdir, step, "params").name
    return make(workdir=workdir, step=step if step == "newest" else int(step))


def check(average: str, checkpoint: str) -> Callable:
    """What ``average`` names; raises ValueError where one of the two is impossible."""
    if checkpoint not in ("newest", "best") and not checkpoint.isdigit():
        raise ValueError(f"checkpoint must be newest, best or a step, got {checkpoint!r}")
    return specs.function(average, CHOICES, "average", filled=("workdir", "step"))


def _kept(name: str, called: str) -> Callable:
    def read(workdir: str, step: int | str) -> tuple[Any, int, str]:
        params, found = restore.restore_ema(workdir, name, step=step)
        return params, found, f"{called} parameters after step {found}"

    return read


def _posthoc(workdir: str, step: int | str, sigma_rel: float) -> tuple[Any, int, str]:
    return _mixed(workdir, step, sigma_rel, f"sigma_rel={sigma_rel:g}")


def _posthoc_constant(workdir: str, step: int | str, decay: float) -> tuple[Any, int, str]:
    return _mixed(workdir, step, ema.constant(decay), f"decay={decay:g}")


def _mixed(workdir: str, step: int | str, target: Any, called: str) -> tuple[Any, int, str]:
    with field("average"):
        params, how = posthoc.reconstruct(workdir, target, None if step == "newest" else step)
    text = (
        f"parameters averaged after the fact with {called} up to step {how.step}, from "
        f"{how.snapshots} snapshots; the profile's relative residual is {how.residual:.1e}"
    )
    if how.residual > WORTH_A_WARNING:
        text += " (large: better at a step with a snapshot, or from more snapshots)"
    return params, how.step, text


CHOICES = {
    "ema": _kept("ema", "averaged"),
    "params": _kept("params", "trained"),
    "posthoc": _posthoc,
    "posthoc_constant": _posthoc_constant,
}
