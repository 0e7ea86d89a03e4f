"""The table of runs: seeds are one row, and each evaluation's settings are a row of their own."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import compare


def evaluated(folder, frechet, **sampler):
    settings = {"step": 20, "sampler": {"solver": "ddim", "steps": 4} | sampler}
    folder.mkdir(parents=True)
    text = json.dumps({"settings": settings, "frechet_half": frechet})
    (folder / "evaluation.json").write_text(text)


@pytest.fixture
def runs(tmp_path):
    for seed, frechet in enumerate((1.0, 2.0)):
        folder = tmp_path / f"run{seed}"
        evaluated(folder, frechet)
        config = {"seed": seed, "model": {"name": "unet", "unet": {"width": 8}, "dit": {}}}
        (folder / "config.json").write_text(json.dumps(config | {"sampler": {"solver": "auto"}}))
    evaluated(tmp_path / "run0" / "evaluations" / "a", 1.0)  # the same once more
    evaluated(tmp_path / "run0" / "evaluations" / "b", 9.0, solver="ddpm")
    return [tmp_path / "run0", tmp_path / "run1"]


def test_two_evaluations_of_one_run_are_not_two_seeds(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare.py", *map(str, runs)])
    compare.main()
    assert capsys.readouterr().out.splitlines() == [
        "| sampler.solver | seeds | Fréchet |",
        "|---|---|---|",
        "| ddim | 2 | 1.50 ± 0.71 |",
        "| ddpm | 1 | 9.00 |",
    ]
