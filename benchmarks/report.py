"""What every measurement says about itself, and how it is shown."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax


def environment(*packages: str) -> dict[str, Any]:
    """Hardware, versions of ``packages``, commit and command."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].split(":")[1].strip() if names else cpu
    versions = {"python": platform.python_version()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "load": os.getloadavg()[0],
        "devices": [device.device_kind for device in jax.devices()],
        "versions": versions,
        "commit": commit or None,
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
    }


def save(path: str | Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Both into a JSON file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(json.dumps({"environment": about, "rows": list(rows)}, indent=2) + "\n")


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """Markdown: key -> column's head; numbers with three digits, nothing where a row lacks them."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [
            f"{v:.3g}" if isinstance(v := row.get(key, ""), float) else str(v) for key in columns
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
