"""The log of a run: TensorBoard, ``metrics.jsonl``, the terminal, and Weights & Biases."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from diffusion.runs.events import Events
from diffusion.runs.storage import Appender

ID = "wandb_id.txt"


def wandb_installed() -> bool:
    return "wandb" in sys.modules or importlib.util.find_spec("wandb") is not None


class Tracker:
    """A run of Weights & Biases; it stays the same one whenever the workdir's run continues.

    Steps that repeat after a restart are not logged twice: W&B accepts steps only in ascending
    order, and repeated steps have the same numbers. With WANDB_MODE=offline everything stays
    in ``workdir/wandb`` until ``wandb sync``.
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


class Logger:
    """Writes ``workdir/metrics.jsonl`` and TensorBoard events in ``workdir/tensorboard``.

    Each line of ``metrics.jsonl`` is {"step": s, name: number, ...}. JSON has no non-finite
    numbers; they become null. A tracker receives the same.
    """

    def __init__(self, workdir: str | os.PathLike, tracker: Tracker | None = None):
        self._workdir = Path(workdir)
        self._workdir.mkdir(parents=True, exist_ok=True)
        self._file = self._workdir / "metrics.jsonl"
        self._tracker = tracker
        self._lines = Appender(self._file, self.text)
        self._events: Events | None = None

    def rewind(self, step: int) -> None:
        """Removes the lines after ``step``, from which the run continues: no step appears twice."""
        if self._file.exists():
            kept = [line for line in self._file.read_bytes().splitlines() if _step(line) <= step]
            partial = self._file.with_suffix(".jsonl.partial")
            partial.write_bytes(b"".join(line + b"\n" for line in kept))
            partial.replace(self._file)
        self.close()
        self._tensorboard.purge(step + 1)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One line of ``metrics.jsonl`` and one point of each curve."""
        values = {name: float(value) for name, value in values.items()}
        line = {n: v if math.isfinite(v) else None for n, v in values.items()}
        self._lines.write((json.dumps({"step": step, **line}) + "\n").encode())
        self._lines.flush()
        for name, value in values.items():
            self._tensorboard.scalar(name, value, step)
        if self._tracker is not None:
            self._tracker.scalars(step, values)

    def image(self, name: str, image: np.ndarray, step: int) -> None:
        """A picture [H, W, 1 or 3], uint8 or float in [0, 1], for TensorBoard."""
        image = np.asarray(image)
        if image.ndim != 3 or image.shape[-1] not in (1, 3):
            raise ValueError(f"expected an image [H, W, 1 or 3], got shape {image.shape}")
        self._tensorboard.image(name, image, step)
        if self._tracker is not None:
            self._tracker.image(name, image, step)

    def text(self, message: str) -> None:
        """A line on the terminal, above the progress bar if there is one."""
        tqdm.write(message)

    def close(self) -> None:
        """Writes what is buffered; the logger can still be used afterwards."""
        self._lines.close()
        if self._events is not None:
            self._events.close()
            self._events = None

    @property
    def _tensorboard(self) -> Events:
        if self._events is None:
            self._events = Events(self._workdir / "tensorboard", self.text)
        return self._events


class Silent(Logger):
    """Logs nothing: of several processes, only the first logs."""

    def __init__(self, workdir: str | os.PathLike):
        del workdir

    def _nothing(self, *_: object) -> None:
        """Stands for every method of ``Logger``."""

    rewind = scalars = image = text = close = _nothing


def _step(line: bytes) -> float:
    """The line's step; infinite if the line is damaged or was not written to its end."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return math.inf
