"""--mode=compare: a table and a picture of the evaluations of several runs."""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from diffusion.config import results
from diffusion.errors import field
from diffusion.evaluation import comparison, comparison_report
from diffusion.evaluation.comparison import Result
from diffusion.runs import workdir as workdirs
from diffusion.specs import texts

RUNS, FIGURES = "config.compare.runs", "config.compare.figures"


def run(config: ConfigDict, workdir: str | None) -> None:
    """Compares the evaluations of ``config.compare.runs`` by ``config.compare.figures``.

    Prints the table, and leaves comparison.md, comparison.json and comparison.png in ``workdir``,
    or else in the current folder.
    """
    figures = texts(config.compare.figures)
    wrong = [name for name in figures if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"{FIGURES} must be names in quotes, got {wrong[0]!r}")
    found = [result for folder in _folders(config.compare.runs) for result in _results(folder)]
    if not found:
        raise ValueError(
            f"{RUNS}={config.compare.runs!r}: none of these folders has an {results.EVALUATION}, "
            "which training writes at its end, and --mode=evaluate"
        )
    compared = comparison.compare(found, figures)
    folder = Path(workdir or ".")
    text = comparison_report.markdown(compared)
    workdirs.write_text(folder / "comparison.md", text)
    workdirs.write_text(folder / "comparison.json", json.dumps(compared, indent=2) + "\n")
    comparison_report.picture(folder / "comparison.png", compared)
    print(text)
    print(f"comparison.md, comparison.json and comparison.png in {folder}")


def _folders(given: Any) -> list[Path]:
    """The folders that patterns name, each once."""
    patterns = list(given) if isinstance(given, tuple | list) else [given]
    wrong = [pattern for pattern in patterns if not isinstance(pattern, str) or not pattern]
    if wrong or not patterns:
        raise ValueError(
            f"{RUNS} must be folders or patterns of these, such as 'runs/ablation/*', got {given!r}"
        )
    found = {}
    for pattern in patterns:
        matching = sorted(Path(p) for p in glob.glob(str(Path(pattern).expanduser())))
        folders = {path.resolve(): path for path in matching if path.is_dir()}
        if not folders:
            raise FileNotFoundError(f"{RUNS}={pattern!r}: no folder matches")
        found |= folders
    return list(found.values())


def _results(folder: Path) -> list[Result]:
    """The evaluations of a run, at its end and by --mode=evaluate, or a single one of these."""
    single = folder.resolve().parent.name == "evaluations"
    owner = folder.resolve().parents[1] if single else folder
    paths = [folder / results.EVALUATION]
    paths += [] if single else sorted(folder.glob(f"evaluations/*/{results.EVALUATION}"))
    paths = [path for path in paths if path.is_file()]
    if not paths:
        print(f"note: {folder} has no {results.EVALUATION} and is left out")
        return []
    with field(RUNS):
        config = workdirs.read_config(owner) or {}
        return [_result(path, config) for path in paths]


def _result(path: Path, config: Mapping[str, Any]) -> Result:
    try:
        found = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    try:
        return comparison.result(str(path.parent), config, found)
    except (AttributeError, KeyError, TypeError, SyntaxError):
        raise ValueError(
            f"{path} is damaged: expected figures by their names, with settings and provenance"
        ) from None
