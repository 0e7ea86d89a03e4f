"""Where a run comes from: its configuration, the version of the code, the command."""

from __future__ import annotations

import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def about(config: ConfigDict) -> dict[str, Any]:
    """The record of a run in each checkpoint: configuration, version of the code, command."""
    return {"config": config.to_dict(), "code": code(), "command": shlex.join(sys.argv)}


def code() -> dict[str, Any]:
    """Git's commit, whether files differ from it (None outside a clone), and versions."""
    commit, changes = _git("rev-parse", "HEAD"), _git("status", "--porcelain")
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
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
