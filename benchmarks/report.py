"""Reports of measurements: the environment, the rows found so far, tables."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
RESULTS = "runs/benchmarks"


def arguments(doc: str, name: str) -> argparse.ArgumentParser:
    """A parser with the options that all scripts share."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", default=f"{RESULTS}/{name}.json", help="where results go")
    parser.add_argument("--small", action="store_true", help="tiny cases, to try the script")
    parser.add_argument("--repetitions", type=int, default=5, help="medians are over these")
    parser.add_argument("--seconds", type=float, default=0.3, help="at least so long is one turn")
    parser.add_argument("--only", default="", help="cases whose names contain one of these (a;b)")
    parser.add_argument("--skip", default="", help="variants whose names contain one of these")
    parser.add_argument(
        "--limit", type=float, default=0, help="start no further case after this many seconds"
    )
    parser.add_argument(
        "--batch", type=int, default=0, help="batch size of all cases, instead of their own"
    )
    return parser


class Report:
    """A table that grows: every row is written to the JSON file at once.

    Args:
      arguments: of the script.
      columns: key -> head of the table's column.
      packages: their versions are reported besides JAX's.
    """

    def __init__(self, arguments: argparse.Namespace, columns: Mapping[str, str], *packages: str):
        self._path, self._columns = arguments.json, columns
        self._began = time.monotonic()
        self._rows: list[Mapping[str, Any]] = []
        self._about = environment("jax", "jaxlib", "flax", "optax", *packages)
        self._about |= {"arguments": vars(arguments), "notes": []}

    def __enter__(self) -> Report:
        about = self._about
        self.log(f"{about['cpu']}, {about['cores']} cores, load {about['load']:.1f}; "
                 f"{', '.join(about['devices'])}")  # fmt: skip
        return self

    def __exit__(self, *_: object) -> None:
        if self._rows:
            shown = {k: v for k, v in self._columns.items() if any(k in row for row in self._rows)}
            print(table(self._rows, shown))
        print(f"results: {self._path}", flush=True)

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row; it replaces the last one if that is an earlier state of the same case."""
        same = ("case", "batch", "what")
        last = self._rows[-1] if self._rows else {}
        if "runs" in row and "runs" in last and all(last.get(k) == row.get(k) for k in same):
            self._rows.pop()
        self._rows.append(row)
        save(self._path, self._about, self._rows)
        self.log(table([row], {k: v for k, v in self._columns.items() if k in row}))

    def note(self, text: str) -> None:
        """Reports and keeps a remark, for example that something is missing."""
        self._about["notes"].append(text)
        save(self._path, self._about, self._rows)
        self.log(text)

    def late(self, what: str = "") -> bool:
        """Whether the time of --limit is over; if so, notes that ``what`` is skipped."""
        limit = self._about["arguments"]["limit"]
        over = bool(limit) and time.monotonic() - self._began > limit
        if over and what:
            self.note(f"{what}: not measured, the time was over")
        return over

    def log(self, text: str) -> None:
        """A line about the progress."""
        print(text, file=sys.stderr, flush=True)


def finish(
    rows: Sequence[Mapping[str, Any]],
    columns: Mapping[str, str],
    arguments: argparse.Namespace,
    *packages: str,
) -> None:
    """Prints the environment and the table; writes both to ``arguments.json``, if it is given."""
    about = environment("jax", *packages)
    print(f"{about['cpu']}, {about['cores']} cores, load {about['load']:.1f}; {about['devices']}")
    print(table(rows, columns))
    if arguments.json:
        save(arguments.json, about | {"arguments": vars(arguments)}, rows)


def in_turns(calls: Mapping[str, Callable[[], Any]], turns: int) -> dict[str, float]:
    """Milliseconds of each call, a function of JAX: medians over turns of five calls."""
    import jax

    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(turns):
        for name, call in calls.items():
            began = time.perf_counter()
            for _ in range(5):
                out = call()
            jax.block_until_ready(out)
            times[name].append((time.perf_counter() - began) / 5)
    return {name: 1e3 * statistics.median(all_) for name, all_ in times.items()}


@cache
def has_gpu() -> bool:
    """Whether JAX computes on an NVIDIA GPU here; loads no library that would take GPU memory."""
    if os.environ.get("JAX_PLATFORMS", "cuda") in ("cpu",):
        return False
    try:
        return bool(_gpus())
    except (FileNotFoundError, subprocess.SubprocessError):
        return False


def _gpus() -> list[str]:
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


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
        "devices": _gpus() if has_gpu() else ["cpu"],
        "versions": versions,
        "commit": commit or None,
        "command": " ".join([Path(sys.executable).name, *sys.argv]),
    }


def save(path: str | Path, about: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes both to a JSON file, which is complete at any time."""
    save_json(path, {"environment": about, "rows": list(rows)})


def save_json(path: str | Path, found: Mapping[str, Any]) -> None:
    """Writes JSON to a file that is complete at any time."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(found, indent=2, default=str) + "\n")
    new.replace(path)


def table(rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> str:
    """A Markdown table; columns: key -> head. Numbers have three digits; missing ones are empty."""
    lines = ["| " + " | ".join(columns.values()) + " |", "|" + "---|" * len(columns)]
    for row in rows:
        cells = [
            f"{v:.3g}" if isinstance(v := row.get(key, ""), float) else str(v) for key in columns
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
