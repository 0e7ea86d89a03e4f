"""Weights & Biases, imported only if a configuration uses it."""

from __future__ import annotations

import importlib.util
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

ID = "wandb_id.txt"


def installed() -> bool:
    return "wandb" in sys.modules or importlib.util.find_spec("wandb") is not None


class Tracker:
    """A run of Weights & Biases; it stays the same one whenever the workdir's run continues.

    Steps that repeat after a restart are not logged twice: W&B accepts steps only in ascending
    order, and repeated steps have the same numbers. With WANDB_MODE=offline everything stays
    in ``workdir/wandb`` until ``wandb sync``.

    Args:
      workdir: of the run; holds the id and W&B's files.
      project: its name on W&B.
      config: shown on W&B.
    """

    def __init__(self, workdir: str | os.PathLike, project: str, config: Mapping[str, Any]):
        import wandb

        self._wandb = wandb
        workdir = Path(workdir).absolute()
        path = workdir / ID
        if not path.exists():
            path.write_text(uuid.uuid4().hex[:12])
        self._run = wandb.init(
            project=project,
            id=path.read_text().strip(),
            resume="allow",
            name=workdir.name,
            dir=str(workdir),
            config=dict(config),
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()
