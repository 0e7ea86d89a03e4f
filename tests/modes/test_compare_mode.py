"""--mode=compare on folders of runs, and what it says of mistakes."""

import json

import pytest
from commands import command, first_sentence, succeed


def write(folder, seed, learning_rate, fd, recognised):
    folder.mkdir(parents=True)
    config = {"seed": seed, "optimizer": {"learning_rate": learning_rate}}
    (folder / "config.json").write_text(json.dumps(config))
    evaluation = {
        "settings": {"step": 20, "sampler": {"solver": "ddim", "seed": 0}},
        "fd_pixels": fd,
        "fd_pixels_real": 0.5,
        "recognised": recognised,
        "provenance": {
            "frechet(pixels)": {"figures": ["fd_pixels", "fd_pixels_real"], "network": "pixels"},
            "recognition(digits_svc)": {"figures": ["recognised"], "network": "digits_svc"},
        },
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return evaluation


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        write(tmp_path / f"runs/a{seed}", seed, 0.1, 1.0 + 0.01 * seed, 0.9 + 0.01 * seed)
        write(tmp_path / f"runs/b{seed}", seed, 0.2, 2.0 + 0.01 * seed, 0.91 + 0.01 * seed)
    return tmp_path


def test_a_pattern_becomes_a_table_and_a_picture(runs):
    printed = succeed("--mode=compare", "--config.compare.runs=runs/*", config=None)
    assert "| 0.1 | 3 | 91.0 ± 1.0 ≈ | **1.010 ± 0.010** |" in printed
    assert "| 0.2 | 3 | **92.0 ± 1.0** | 2.010 ± 0.010 |" in printed
    assert (runs / "comparison.md").read_text().strip() in printed
    assert (runs / "comparison.png").stat().st_size > 0
    rows = json.loads((runs / "comparison.json").read_text())["rows"]
    assert rows[1]["figures"]["fd_pixels"]["p_holm"] < 1e-6


def test_single_evaluations_and_chosen_figures(runs):
    again = json.loads((runs / "runs/a0/evaluation.json").read_text())
    again["settings"]["sampler"]["solver"] = "ddpm"
    place = runs / "runs/a0/evaluations/0123"
    place.mkdir(parents=True)
    (place / "evaluation.json").write_text(json.dumps(again))
    succeed(
        *("--mode=compare", "--config.compare.runs=('runs/a0/evaluations/*','runs/a1')"),
        *("--config.compare.figures=fd_pixels", "--workdir=out"),
        config=None,
    )
    found = json.loads((runs / "out/comparison.json").read_text())
    assert found["fields"] == ["sampler.solver"] and list(found["figures"]) == ["fd_pixels"]
    assert [row["setting"] for row in found["rows"]] == [["ddim"], ["ddpm"]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "config.compare.runs must be folders or patterns"),
        (("--config.compare.runs=none/*",), "config.compare.runs='none/*': no folder matches"),
        (("--config.compare.runs=empty",), "none of these folders has an evaluation.json"),
        (
            ("--config.compare.runs=runs/*", "--config.compare.figures=fd_pixel"),
            "unknown 'fd_pixel'; choose one of fd_pixels, recognised. Did you mean 'fd_pixels'",
        ),
        (
            ("--config.compare.runs=runs/*", "--config.compare.figures=(3,)"),
            "config.compare.figures must be names in quotes, got 3",
        ),
        (
            ("--config.compare.runs=runs/*", "--config.sampler.steps=3"),
            "config.sampler.steps has no effect in --mode=compare",
        ),
        (
            ("--config.compare.runs=runs/*", "--config.train.steps=3"),
            "config.train.steps has no effect in --mode=compare",
        ),
    ],
)
def test_mistakes(runs, arguments, said):
    (runs / "empty").mkdir()
    error, _ = command("--mode=compare", *arguments, config=None)
    first_sentence(error)
    assert said in error
    assert not (runs / "comparison.md").exists()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        *(("config.json", text) for text in ("{", "[]", "3")),
        *(("evaluation.json", text) for text in ("{", "[]", "3", '{"settings": 3}')),
        ("evaluation.json", '{"provenance": {"f(": 3}}'),
    ],
)
def test_damaged_files_are_named(runs, name, text):
    (runs / "runs/b1" / name).write_text(text)
    error, _ = command("--mode=compare", "--config.compare.runs=runs/*", config=None)
    first_sentence(error)
    assert f"runs/b1/{name} is damaged" in error
