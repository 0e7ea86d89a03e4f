"""A table of finished runs: the fields in which their configs differ, and their evaluations.

    python benchmarks/compare.py runs/ablation/*

Runs that differ in their seed alone are one row, with mean and standard deviation. Evaluations of
one run with different settings (--mode=evaluate) are different rows.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np

FIGURES = {
    "recognised": ("recognised [%]", 100, 1),
    "frechet_half": ("Fréchet", 1, 2),
    "nearest_ratio": ("nearest / real", 1, 2),
    "sliced_wasserstein": ("sliced W2", 1, 4),
}

DRAWING = ("sampler", "samples", "evaluation", "sweep", "learn", "inspect", "profile", "log")
"""Sections that say nothing of the model; those of an evaluation are in its own settings."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="working directories")
    runs = {}
    for folder in parser.parse_args().runs:
        found = _evaluations(folder)
        runs |= {(folder, str(settings)): (settings, result) for settings, result in found}
        if not found:
            print(f"{folder}: no evaluation.json, left out")
    if not runs:
        raise SystemExit("no finished runs")
    print("\n".join(table(runs)))


def table(runs: dict[tuple[Path, str], tuple[dict, dict]]) -> list[str]:
    """The lines, of (settings, figures) by run and settings."""
    configs = [config for config, _ in runs.values()]
    names = sorted(set().union(*configs) - {"seed"})
    # A field that some configs lack belongs to their model and is no choice of its own.
    differing = [
        n for n in names if all(n in c for c in configs) and len({str(c[n]) for c in configs}) > 1
    ]
    rows = defaultdict(list)
    for config, result in runs.values():
        rows[tuple(str(config[name]) for name in differing)].append(result)
    shown = [key for key in FIGURES if any(key in result for _, result in runs.values())]

    head = [*differing, "seeds", *(FIGURES[key][0] for key in shown)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for setting, results in sorted(rows.items()):
        cells = [*setting, str(len(results))]
        for key in shown:
            _, factor, digits = FIGURES[key]
            values = np.array([result[key] for result in results if key in result]) * factor
            spread = f" ± {values.std(ddof=1):.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{spread}" if len(values) else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _evaluations(folder: Path) -> list[tuple[dict, dict]]:
    """(settings, figures) of each evaluation of a run: at its end, and by --mode=evaluate.

    The settings are those of the evaluation, and of the config what the model is.
    """
    paths = [folder / "evaluation.json", *sorted(folder.glob("evaluations/*/evaluation.json"))]
    results = [json.loads(path.read_text()) for path in paths if path.exists()]
    if not results:
        return []
    config = json.loads((folder / "config.json").read_text())
    used = config["model"]["name"]
    config["model"] = {"name": used, used: config["model"][used]}  # without those not used
    for name in DRAWING:
        config.pop(name, None)
    return [(_flatten(config) | _flatten(r.get("settings", {})), r) for r in results]


def _flatten(config: dict, prefix: str = "") -> dict:
    flat = {}
    for name, value in config.items():
        flat |= (
            _flatten(value, f"{prefix}{name}.")
            if isinstance(value, dict)
            else {prefix + name: value}
        )
    return flat


if __name__ == "__main__":
    main()
