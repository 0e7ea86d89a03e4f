"""Checkpoints with Orbax, and the configuration that a working directory belongs to.

A checkpoint is ``workdir/checkpoints/<step>``, with params, opt_state and each average as items of
their own, so that sampling reads one average alone. It appears under its name only when complete.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from diffusion.training.state import TrainState

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every phase of every save.

CONFIG = "config.json"


class Checkpoints:
    """The checkpoints of a run.

    Args:
      workdir: the run's directory.
      keep: how many of the newest stay; None for all.
    """

    def __init__(self, workdir: str | os.PathLike, *, keep: int | None = 3):
        if keep is not None and keep < 1:
            raise ValueError(f"keep must be at least 1, or None for all, got {keep}")
        self._directory = Path(workdir).absolute() / "checkpoints"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, cleanup_tmp_directories=True, enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(self._directory, options=options)

    def latest(self) -> int | None:
        """The newest checkpoint's step; None where there is none."""
        return self._manager.latest_step()

    def save(self, state: TrainState, extra: Mapping[str, Any] | None = None) -> None:
        """Starts to save in the background; the state may be donated at once.

        A step that is saved already is left as it is. ``extra`` is any JSON.
        """
        step = int(state.step)
        if step == self._manager.latest_step():
            return
        items = {f"ema_{name}": params for name, params in state.ema.items()}
        items |= {"params": state.params, "opt_state": state.opt_state}
        args = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        args["extra"] = ocp.args.JsonSave({"step": step, **(extra or {})})
        self._manager.save(step, args=ocp.args.Composite(**args))

    def restore(self, template: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest checkpoint and its ``extra``.

        Args:
          template: a state of ``jax.ShapeDtypeStruct`` (or arrays) with the shardings wanted.
        """
        step = self.latest()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self._directory}")
        items = {f"ema_{name}": params for name, params in template.ema.items()}
        items |= {"params": template.params, "opt_state": template.opt_state}
        args = {name: ocp.args.StandardRestore(item) for name, item in items.items()}
        args["extra"] = ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        extra = dict(restored.extra)
        count = jax.device_put(jnp.int32(extra.pop("step")), template.step.sharding)
        ema = {name: restored[f"ema_{name}"] for name in template.ema}
        return TrainState(count, restored.params, restored.opt_state, ema), extra

    def close(self) -> None:
        """Waits until everything is on disk."""
        self._manager.close()


def restore_ema(
    workdir: str | os.PathLike,
    name: str,
    *,
    template: Any = None,
    step: int | None = None,
) -> tuple[Any, int]:
    """One average of a run, and the step that it is from.

    Args:
      workdir: the run's directory.
      name: the average's name; "params" for the parameters that were trained.
      template: parameters of ``jax.ShapeDtypeStruct`` with shardings; None for nested dicts on
        the first device.
      step: which checkpoint; None for the newest.

    Raises:
      FileNotFoundError: there is no (such) checkpoint.
      ValueError: it holds no such average.
    """
    directory = Path(workdir).absolute() / "checkpoints"
    steps = sorted(ocp.utils.checkpoint_steps(directory)) if directory.exists() else []
    if not steps or (step is not None and step not in steps):
        raise FileNotFoundError(
            f"no checkpoint{'' if step is None else f' of step {step}'} in {directory};"
            f" there are {steps or 'none'}"
        )
    step = steps[-1] if step is None else step
    item = name if name == "params" else f"ema_{name}"
    path = directory / str(step)
    if not (path / item).exists():
        names = sorted(p.name.removeprefix("ema_") for p in path.glob("ema_*"))
        raise ValueError(f"{path} holds no average {name!r}; choose one of {[*names, 'params']}")
    with ocp.StandardCheckpointer() as checkpointer:
        if template is None:
            place = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            template = jax.tree.map(
                lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=place),
                checkpointer.metadata(path / item).item_metadata.tree,
            )
        return checkpointer.restore(path / item, template), step


def check_config(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    changeable: Sequence[str] = (),
) -> None:
    """Refuses a configuration other than that of the run in ``workdir``, if there is one.

    Args:
      workdir: the run's directory.
      config: nested dicts of JSON values.
      changeable: patterns (``fnmatch``) of dotted names that may differ from the run's.

    Raises:
      ValueError: the run has checkpoints, and settings differ; the message lists them.
    """
    workdir = Path(workdir)
    path = workdir / CONFIG
    if not path.exists() or not any((workdir / "checkpoints").glob("[0-9]*")):
        return
    old, new = _flatten(json.loads(path.read_text())), _flatten(json.loads(_as_json(config)))
    lines = [
        f"  {name}: {_shown(old, name)} there, {_shown(new, name)} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, ...) != new.get(name, ...)
        and not any(fnmatch(name, pattern) for pattern in changeable)
    ]
    if lines:
        raise ValueError(
            f"{workdir} holds a run with another configuration:\n" + "\n".join(lines) + "\n"
            "Choose another workdir, or the run's own settings."
        )


def save_config(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes ``workdir/config.json``, whole or not at all; makes the directory if missing."""
    path = Path(workdir) / CONFIG
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".json.partial")
    partial.write_text(_as_json(config))
    partial.replace(path)


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return repr(flat[name]) if name in flat else "(absent)"


def _as_json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, default=str) + "\n"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return repr(flat[name]) if name in flat else "(absent)"
