"""A run's working directory: one run at a time, its configuration, and where it comes from."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

CONFIG = "config.json"
ABOUT = "about.json"  # of a checkpoint
SETTINGS = "settings.json"
STARTS = "starts.jsonl"
LOCK = "lock"
CHECKPOINTS = "checkpoints"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")

_held: set[Path] = set()


class InUseError(ValueError):
    """Another run writes into the directory."""


def steps(workdir: str | os.PathLike) -> list[int]:
    """The steps of which there are checkpoints, oldest first."""
    folder = Path(workdir) / CHECKPOINTS
    names = (path.name for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())


@contextmanager
def held(workdir: str | os.PathLike) -> Iterator[None]:
    """Only this process may write into the directory, until the block ends.

    The lock ends with the process, so that a killed run leaves none behind. Blocks of one process
    may be nested. Of several processes of one run, the first holds the lock.

    Raises:
      InUseError: another process holds it; names process and machine.
    """
    folder = Path(workdir).absolute()
    if jax.process_index() != 0 or folder in _held:
        yield
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
    with suppress(OSError):  # a full disk: the lock holds, only without a name
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
    _held.add(folder)
    try:
        yield
    finally:
        _held.remove(folder)
        file.close()


@contextmanager
def results(folder: Path, settings: Mapping[str, Any]) -> Iterator[Path]:
    """A folder to fill with the results of ``settings``, which it holds as settings.json.

    When the block ends it becomes ``folder / named(settings)``, instead of what was there; if the
    block fails, nothing changes.
    """
    place = folder / named(settings)
    partial = place.with_name(place.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        (partial / SETTINGS).write_text(as_json(settings))
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def named(settings: Mapping[str, Any]) -> str:
    """A short hash of settings, the name of their results' folder."""
    text = json.dumps(settings, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def differences(
    workdir: str | os.PathLike, config: Mapping[str, Any], changeable: Sequence[str] = ()
) -> list[str]:
    """How a configuration differs from that of the run in ``workdir``, a line for each field.

    Args:
      workdir: the run's directory; where it holds no checkpoint, nothing differs.
      config: nested dicts of JSON values.
      changeable: patterns (``fnmatch``) of dotted names that are left out.
    """
    if not steps(workdir) or (stored := _stored(workdir)) is None:
        return []
    old, new = _flatten(stored), _flatten(json.loads(as_json(config)))
    shown = [{name: repr(value) for name, value in flat.items()} for flat in (old, new)]
    return [
        "  {}: {} there, {} here".format(name, *(flat.get(name, "(absent)") for flat in shown))
        for name in sorted(old.keys() | new.keys())
        if old.get(name, ...) != new.get(name, ...)
        and not any(fnmatch(name, pattern) for pattern in changeable)
    ]


def read_config(workdir: str | os.PathLike) -> dict[str, Any] | None:
    """The configuration of the run in ``workdir``, with tuples for JSON's lists, or None.

    Where config.json is gone it is that of the newest checkpoint.
    """
    return tuples(_stored(workdir))


def _stored(workdir: str | os.PathLike) -> dict[str, Any] | None:
    path = Path(workdir) / CONFIG
    if path.exists():
        return _read(path)
    for step in reversed(steps(workdir)):
        with suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
            about = (path.parent / CHECKPOINTS / str(step) / ABOUT).read_text()
            return dict(json.loads(about)["config"])
    return None


def save_config(workdir: str | os.PathLike, config: Mapping[str, Any]) -> None:
    """Writes ``workdir/config.json``, complete or not at all; makes the directory if missing."""
    write_text(Path(workdir) / CONFIG, as_json(config))


def record_start(workdir: str | os.PathLike, step: int, about: Mapping[str, Any]) -> None:
    """Adds a line to ``workdir/starts.jsonl``: the time, the last step so far, and ``about``."""
    line = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "after_step": step}
    with (Path(workdir) / STARTS).open("a") as file:
        file.write(json.dumps({**line, **about}, default=str) + "\n")


def about(config: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a run in each checkpoint: configuration, version of the code, command."""
    return {"config": config, "code": _code(), "command": shlex.join(sys.argv)}


def _code() -> dict[str, Any]:
    """Git's commit, whether files differ from it (None outside a clone), and versions."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    versions = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "commit": commit,
        "changed": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "packages": versions,
    }


def _git(*arguments: str) -> str | None:
    root = Path(__file__).parents[2]
    try:
        done = subprocess.run(
            ["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


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
    with suppress(ValueError, RecursionError):
        config = json.loads(path.read_text())
        if isinstance(config, dict):
            return config
    raise ValueError(
        f"{path} is damaged, and with it the settings of the run. Each line of "
        f"{path.with_name(STARTS)} has a copy; restore it from the last line"
    )


def tuples(value: Any) -> Any:
    """JSON's lists as the tuples that they were."""
    if isinstance(value, dict):
        return {name: tuples(entry) for name, entry in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
