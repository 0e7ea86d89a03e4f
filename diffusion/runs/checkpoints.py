"""Checkpoints with Orbax: saved in the background, complete or not at all, and checked when read.

A checkpoint is ``workdir/checkpoints/<step>``:

    params/, opt_state/, ema_<name>/   Orbax's; separate items, so that sampling reads one average
    extra/                             likewise, where the objective's own step keeps anything
    about.json                         step, log's interval, metrics, configuration, code version
    manifest.json                      size and checksum of every file

The step determines keys and data: the key is fold_in(key of the seed, step), and the next batch is
that of the step. A checkpoint lies in ``.saving`` until it is complete.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from diffusion.runs import manifest, storage
from diffusion.runs import workdir as workdirs
from diffusion.runs.restore import DamagedError, all_damaged, different, listed, ranked

SAVING = ".saving"


class SaveError(OSError):
    """The last checkpoint could not be saved."""


class Checkpoints:
    """The checkpoints of a run, whose working directory this process holds until ``close``.

    All processes of a run call the methods together; the first one removes files and decides.

    Args:
      keep: number of the newest checkpoints that stay; None for all.
      keep_best: number of further checkpoints that stay, those with the best ``best``.
      best: name of a metric that is best when low; "-name" for one that is best when high.
      about: JSON values for every checkpoint: configuration, code version.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        *,
        keep: int | None = 3,
        keep_best: int = 0,
        best: str = "loss",
        about: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = print,
    ):
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, or None for all, got {keep}")
        if keep_best < 0:
            raise ValueError(f"keep_best must be at least 0, got {keep_best}")
        self._lock = contextlib.ExitStack()
        self._lock.enter_context(workdirs.held(workdir))
        storage.silence_asyncio()
        self._workdir = Path(workdir).absolute()
        self._directory = self._workdir / workdirs.CHECKPOINTS
        self._keep, self._keep_best, self._best = keep, keep_best, best
        self._about, self._say = dict(about or {}), say
        self._checkpointer: ocp.AsyncCheckpointer | None = None
        self._thread: threading.Thread | None = None
        self._newest: int | None = None
        self._failed: tuple[int, str] | None = None
        self._bytes = 0  # of the last one
        if jax.process_index() == 0:
            self._directory.mkdir(parents=True, exist_ok=True)
        self._clear()

    def latest(self) -> int | None:
        """The step of the newest undamaged checkpoint; None if there are no checkpoints.

        Newer ones that are damaged are reported and renamed to ``damaged_<step>``; DamagedError is
        raised where all are damaged.
        """
        self.wait()
        if self._newest is None:
            self._newest = _first_decides(self._newest_whole)
            if self._newest is not None:
                self._bytes = manifest.size(self._directory / str(self._newest))
        return self._newest

    def save(
        self,
        state: Any,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to save in the background; the state may be donated at once.

        A step that is saved already stays as it is. A failed save, for example on a full disk, is
        reported and leaves the last good checkpoint; training can continue. ``restore`` returns
        ``extra``, any JSON values; ``metrics`` decide which checkpoints are the best.
        """
        step, metrics = int(state.step), metrics or {}
        self.wait()
        if step == self._newest:
            return
        self._check_best(step, metrics)
        about = {
            "step": step,
            "time": time.strftime("%Y-%m-%d %H:%M:%S"),
            "metrics": {name: float(value) for name, value in metrics.items()},
            "best": self._best,
            "extra": dict(extra or {}),
            **self._about,
        }
        about = workdirs.as_json(about)  # at once: its dicts change while this is saved
        args = {name: ocp.args.StandardSave(item) for name, item in _items(state).items()}
        self._failed = None
        try:
            self._check_room(state)
            if self._checkpointer is None:
                self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
            folder = self._directory / SAVING / str(step)
            folder.parent.mkdir(parents=True, exist_ok=True)
            self._checkpointer.save(folder, args=ocp.args.Composite(**args))
        except (OSError, ValueError) as error:
            if not storage.disk_full(error) and not isinstance(error, OSError):
                raise
            return self._fail(step, error)
        self._thread = threading.Thread(target=self._finish, args=(step, about), name="save")
        self._thread.start()

    def restore(self, template: Any) -> tuple[Any, dict[str, Any]]:
        """The newest undamaged checkpoint and its ``extra``.

        ``template`` is a state of ``jax.ShapeDtypeStruct`` (or arrays) with the target shardings.
        """
        step = self.latest()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._directory}")
        folder = self._directory / str(step)
        items = _items(template)
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        for name in items:
            if not (folder / name).exists():
                raise ValueError(f"{folder} has no {name}, which this configuration trains")
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
                restored = checkpointer.restore(folder, args=ocp.args.Composite(**args))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{folder} is of another model or optimiser than this configuration's:\n"
                + (different(folder / "params", items["params"]) or str(error))
            ) from error
        about = json.loads((folder / workdirs.ABOUT).read_text())
        state = template.replace(
            step=jax.device_put(jnp.int32(about["step"]), template.step.sharding),
            params=restored.params,
            opt_state=restored.opt_state,
            ema={name: restored[f"ema_{name}"] for name in template.ema},
            extra=restored["extra"] if "extra" in items else template.extra,
        )
        return state, about["extra"]

    def wait(self) -> None:
        """Waits until the save in progress is on disk or has failed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def finish(self) -> None:
        """Waits for the last save, prunes, and raises SaveError if that save failed."""
        self.wait()
        self.prune()
        if self._failed is not None:
            step, reason = self._failed
            raise SaveError(
                f"the checkpoint of step {step}, the last, could not be saved: {reason}; "
                f"{self._last_good()}. Make room, and the same command goes on from there"
            )

    def close(self) -> None:
        """Waits until everything is on disk, and releases the working directory."""
        self.wait()
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None
        self._clear()
        self._lock.close()

    def _clear(self) -> None:
        if jax.process_index() == 0:
            shutil.rmtree(self._directory / SAVING, ignore_errors=True)

    def _check_best(self, step: int, metrics: Mapping[str, float]) -> None:
        name = self._best.removeprefix("-")
        if self._keep_best and metrics and name not in metrics and jax.process_index() == 0:
            near = difflib.get_close_matches(name, metrics, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self._say(
                f"the checkpoint of step {step} cannot be among the best: the log has no {name!r} "
                f"yet{hint}, only {', '.join(sorted(metrics))}"
            )

    def _check_room(self, state: Any) -> None:
        """Avoids a save that cannot succeed. Several processes try, since all must act alike."""
        sizes = (leaf.nbytes for item in _items(state).values() for leaf in jax.tree.leaves(item))
        needed = self._bytes or sum(sizes) // 2  # compressed; parameters hardly are
        if shutil.disk_usage(self._directory).free < needed and jax.process_count() == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _finish(self, step: int, about: str) -> None:
        """The end of a save, in a thread."""
        try:
            self._checkpointer.wait_until_finished()
            if jax.process_index() == 0:
                folder = self._directory / SAVING / str(step)
                (folder / workdirs.ABOUT).write_text(about)
                self._bytes = manifest.write(folder)
                folder.rename(self._directory / str(step))
        except Exception as error:  # any: training must not end for a checkpoint
            return self._fail(step, error)
        self._newest = step
        self.prune()

    def _fail(self, step: int, error: Exception) -> None:
        reason = storage.reason(error, self._directory)
        self._failed = (step, reason)
        with contextlib.suppress(Exception):  # its state is unreliable after a failure
            self._checkpointer.close()
        self._checkpointer = None
        self._clear()
        if jax.process_index() == 0:
            self._say(
                f"the checkpoint of step {step} could not be saved: {reason}; {self._last_good()}"
            )

    def _last_good(self) -> str:
        if self._newest is None:
            return "there is no checkpoint yet"
        return f"the last good checkpoint is {self._directory / str(self._newest)}"

    def prune(self) -> None:
        """Removes checkpoints that are neither among the newest nor among the best."""
        if self._keep is None or jax.process_index() != 0:
            return
        steps = workdirs.steps(self._workdir)
        stay = set(steps[-self._keep :])
        if self._keep_best:
            stay.update(ranked(self._workdir, steps, self._best)[: self._keep_best])
        for step in sorted({*steps} - stay):
            gone = self._directory / SAVING / f"old_{step}"
            try:  # Renamed first, so that none is seen half deleted.
                gone.parent.mkdir(exist_ok=True)
                (self._directory / str(step)).rename(gone)
                shutil.rmtree(gone)
            except OSError as error:
                self._say(f"{gone} could not be removed: {error.strerror}")

    def _newest_whole(self) -> int | None:
        damaged, steps = {}, workdirs.steps(self._workdir)
        while steps and (wrong := manifest.damage(self._directory / str(steps[-1]))):
            damaged[steps.pop()] = wrong
        if damaged and not steps:
            raise DamagedError(all_damaged(self._directory, damaged))
        step = steps[-1] if steps else None
        for bad, wrong in damaged.items():
            aside = _free_name(self._directory / f"damaged_{bad}")
            (self._directory / str(bad)).rename(aside)
            self._say(
                f"the checkpoint of step {bad} is damaged: {listed(wrong)}. It is now "
                f"{aside}; going on from step {step} instead"
            )
        return step


def _items(state: Any) -> dict[str, Any]:
    averages = {f"ema_{name}": params for name, params in state.ema.items()}
    extra = {"extra": state.extra} if jax.tree.leaves(state.extra) else {}
    return {"params": state.params, "opt_state": state.opt_state, **averages, **extra}


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}_{i}") if i else path for i in range(10**6))
    return next(name for name in names if not name.exists())


def _first_decides(function: Callable[[], int | None]) -> int | None:
    """The result of the first process, for all processes."""
    if jax.process_count() == 1:
        return function()
    found, error = -1, None
    if jax.process_index() == 0:
        try:
            step = function()
            found = -1 if step is None else step
        except DamagedError as damage:
            found, error = -2, damage
    found = int(multihost_utils.broadcast_one_to_all(np.int32(found)))
    if found == -2:
        raise error or DamagedError("no checkpoint is whole; the first process says more")
    return None if found == -1 else found
