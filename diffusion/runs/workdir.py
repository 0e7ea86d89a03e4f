"""A run's working directory: one run at a time, and the configuration that it belongs to."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jax

CONFIG = "config.json"
STARTS = "starts.jsonl"
LOCK = "lock"
CHECKPOINTS = "checkpoints"

_held: dict[Path, list] = {}  # workdir: [open file, number of blocks]


class InUseError(ValueError):
    """Another run writes into the directory."""


def steps(workdir: str | os.PathLike) -> list[int]:
    """The steps of which there are checkpoints, oldest first."""
    folder = Path(workdir) / CHECKPOINTS
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if name.isdigit())


@contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
    """Only this process may write into the directory, until the block ends.

    The lock ends with the process, so that a killed run leaves none behind. Blocks of one process
    may be nested. Of several processes of one run, the first holds the lock.

    Raises:
      InUseError: another process holds it; names process and machine.
    """
    acquire(workdir)
    try:
        yield
    finally:
        release(workdir)


def acquire(workdir: str | os.PathLike) -> None:
    """Takes the lock, as ``held`` at its beginning."""
    if jax.process_index() != 0:
        return
    folder = Path(workdir).absolute()
    if folder in _held:
        _held[folder][1] += 1
        return
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise InUseError(
            f"{workdir} is in use: {holder} trains there. Wait for it, stop it, or choose another "
            "workdir (sampling from a run that trains is fine)"
        ) from None
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    except OSError:  # a full disk: the lock holds, only without a name
        pass
    _held[folder] = [file, 1]


def release(workdir: str | os.PathLike) -> None:
    """Releases the lock, as ``held`` at its end."""
    folder = Path(workdir).absolute()
    if folder in _held:
        _held[folder][1] -= 1
        if not _held[folder][1]:
            _held.pop(folder)[0].close()


def check_config(
    workdir: str | os.PathLike,
    config: Mapping[str, Any],
    *,
    changeable: Sequence[str] = (),
    accept: bool = False,
) -> list[str]:
    """Refuses a configuration other than that of the run in ``workdir``, if there is one.

    Args:
      workdir: the run's directory.
      config: nested dicts of JSON values.
      changeable: patterns (``fnmatch``) of dotted names that may differ from the run's.
      defaults: values of settings that the run, of an older version, may lack.
      accept: return the differences, a line each, instead of refusing them.

    Raises:
      ValueError: the run has checkpoints, and settings differ; the message lists them.
    """
    path = Path(workdir) / CONFIG
    if not path.exists() or not steps(workdir):
        return []
    old = _flatten(_read(path))
    new = _flatten(json.loads(as_json(config)))
    lines = [
        f"  {name}: {_shown(old, name)} there, {_shown(new, name)} here"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, ...) != new.get(name, ...)
        and not any(fnmatch(name, pattern) for pattern in changeable)
    ]
    if lines and not accept:
        raise ValueError(
            f"{workdir} holds a run with another configuration:\n" + "\n".join(lines) + "\n"
            "Choose another workdir, or the run's own settings; or go on with these all the same: "
            "config.train.accept_changes=True"
        )
    return lines


def read_config(workdir: str | os.PathLike) -> dict[str, Any]:
    """The configuration of the run in ``workdir``, with tuples for JSON's lists.

    Raises:
      ValueError: the file is damaged.
    """
    return tuples(_read(Path(workdir) / CONFIG))


def save_config(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes ``workdir/config.json``, complete or not at all; makes the directory if missing."""
    write_text(Path(workdir) / CONFIG, as_json(config))


def record_start(workdir: str | os.PathLike, step: int, about: Mapping[str, Any]) -> None:
    """Adds a line to ``workdir/starts.jsonl``: the time, the last step so far, and ``about``."""
    line = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "after_step": step}
    with (Path(workdir) / STARTS).open("a") as file:
        file.write(json.dumps({**line, **about}, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file, complete or not at all; makes its folder if missing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def as_json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, default=str) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        if isinstance(config, dict):
            return config
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        pass
    raise ValueError(
        f"{path} is damaged, and with it the settings of the run. Each line of "
        f"{path.with_name(STARTS)} has a copy; restore it from the last line"
    )


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: tuples(entry) for name, entry in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return repr(flat[name]) if name in flat else "(absent)"


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
