"""One average of a run's parameters, from a checkpoint that is not damaged."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from diffusion.runs import manifest
from diffusion.runs import workdir as workdirs

logging.getLogger("absl").setLevel(logging.CRITICAL)  # We report Orbax's errors ourselves.


class DamagedError(ValueError):
    """There are checkpoints, but all are damaged."""


def restore_ema(
    workdir: str | os.PathLike, name: str, step: int | str | None = None
) -> tuple[Any, int]:
    """One average of a run, as nested dicts on the first device, and its step.

    Args:
      workdir: the run's directory.
      name: the average's name; "params" for the parameters that were trained.
      step: which checkpoint; None or "newest" for the newest undamaged one, "best" for the best.
    """
    item = name if name == "params" else f"ema_{name}"
    path = choose(workdir, step, item)
    place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        template = jax.tree.map(
            lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place),
            checkpointer.metadata(path / item).item_metadata.tree,
        )
        return checkpointer.restore(path / item, template), int(path.name)


def choose(workdir: str | os.PathLike, step: int | str | None, item: str) -> Path:
    """The folder of a checkpoint whose ``item`` is undamaged, which stays as it is."""
    directory = Path(workdir).absolute() / workdirs.CHECKPOINTS
    steps, newest = workdirs.steps(workdir), step in (None, "newest")
    if not steps or (isinstance(step, int) and step not in steps):
        raise FileNotFoundError(
            f"no checkpoint{f' of step {step}' if isinstance(step, int) else ''} in {directory};"
            f" there are {steps or 'none'}"
        )
    if step == "best":
        step = (ranked(workdir, steps) or [None])[0]
        if step is None:
            raise FileNotFoundError(
                f"none of the checkpoints in {directory} has the metric that says which is best"
            )
    damaged = {}
    for candidate in reversed(steps) if newest else [step]:
        path = directory / str(candidate)
        if path.exists() and not (path / item).exists() and (path / manifest.MANIFEST).exists():
            names = sorted(p.name.removeprefix("ema_") for p in path.glob("ema_*"))
            raise ValueError(
                f"{path} holds no average {item.removeprefix('ema_')!r}; choose one of "
                f"{[*names, 'params']}"
            )
        wrong = manifest.damage(path, item, workdirs.ABOUT)
        if not wrong:
            for bad, lines in damaged.items():
                print(
                    f"the checkpoint of step {bad} is damaged: {listed(lines)}. Step "
                    f"{candidate} is taken instead"
                )
            return path
        damaged[candidate] = wrong
    raise DamagedError(all_damaged(directory, damaged))


def ranked(workdir: str | os.PathLike, steps: list[int], best: str | None = None) -> list[int]:
    """The steps whose checkpoints have the metric, the best first, of equal ones the newest.

    Without ``best`` the metric is the one with which they were saved.
    """
    values, directory = {}, Path(workdir) / workdirs.CHECKPOINTS
    for step in steps:
        try:
            about = json.loads((directory / str(step) / workdirs.ABOUT).read_text())
            name = about["best"] if best is None else best
            value = about["metrics"][name.removeprefix("-")]
        except (
            OSError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
            RecursionError,
        ):  # damaged, or from before the metric
            continue
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and np.isfinite(value):
            values[step] = (-value if name.startswith("-") else value, -step)
    return sorted(values, key=values.get)


def different(path: Path, params: Any) -> str:
    """Differences from the stored parameters in name and shape, a line each; "" for none."""
    with ocp.StandardCheckpointer() as checkpointer:
        stored = checkpointer.metadata(path).item_metadata.tree
    there, here = (
        {name: tuple(leaf.shape) for name, leaf in flatten_dict(tree, sep="/").items()}
        for tree in (stored, params)
    )
    lines = [
        f"  {name}: {there.get(name, 'nothing')} there, {here.get(name, 'nothing')} here"
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    return "\n".join(lines[:10] + ([f"  and {len(lines) - 10} more"] if len(lines) > 10 else []))


def listed(wrong: list[str]) -> str:
    """The first few lines of ``manifest.damage`` in one line."""
    more = len(wrong) - 3
    return "; ".join(wrong[:3]) + (f"; and {more} more" if more > 0 else "")


def all_damaged(directory: Path, damaged: Mapping[int, list[str]]) -> str:
    """The message for ``DamagedError``."""
    lines = "\n".join(f"  {step}: {listed(wrong)}" for step, wrong in damaged.items())
    what = "no checkpoint is whole" if len(damaged) > 1 else "the checkpoint is damaged"
    return (
        f"{what} in {directory}:\n{lines}\nRestore the files from a copy, or choose another "
        "workdir to begin anew"
    )
