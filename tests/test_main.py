"""Whole commands, as a user types them."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
SMALL = [
    *("--config.model.unet.widths=(8, 8)", "--config.model.unet.norm_groups=4"),
    *("--config.model.unet.attention=0", "--config.model.unet.mid_attention=0"),
    *("--config.train.batch_size=32", "--config.train.log_every=5"),
    *("--config.train.checkpoint_every=10", "--config.sampler.steps=4"),
    *("--config.sampler.batch_size=50", "--config.samples.columns=4"),
    *("--config.evaluation.count=100", "--config.samples.count=20"),
    "--config.optimizer.warmup=5",
]


CACHE = tempfile.TemporaryDirectory()


def run(*arguments, config="digits"):
    environment = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("device_count=4", "device_count=1"),
        "JAX_COMPILATION_CACHE_DIR": CACHE.name,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.run(
        [sys.executable, "main.py", f"--config=configs/{config}.py", *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def succeed(*arguments, **kwargs):
    done = run(*arguments, **kwargs)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 20 steps, and the arguments that describe it."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    command = [*SMALL, f"--workdir={workdir}"]
    command += ["--config.train.validate_every=10", "--config.train.validation_count=64"]
    succeed(*command, "--config.train.steps=20", "--config.train.sample_every=10")
    return workdir, command


def test_train_leaves_everything(trained):
    workdir, command = trained
    for name in ("samples.png", "trajectory.png", "trajectory.gif", "loss.png", "config.json"):
        assert (workdir / name).stat().st_size > 0, name
    assert list((workdir / "tensorboard").glob("events*"))
    assert (workdir / "samples" / "step_0000010.png").exists()
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == [5, 10, 15, 20] and losses[20] < losses[5]
    held_out = {line["step"]: line["validation_loss"] for line in lines if len(line) == 3}
    assert list(held_out) == [10, 20] and held_out[20] < held_out[10]
    assert "in all" in (workdir / "parameters.txt").read_text()
    judged = json.loads((workdir / "evaluation.json").read_text())
    assert 0 <= judged["recognised"] <= 1 and judged["num_samples"] == 100

    assert "already done" in succeed(*command, "--config.train.steps=20")
    assert "going on after step 20 of 30" in succeed(*command, "--config.train.steps=30")

    other = run(*command, "--config.train.steps=30", "--config.objective.prediction=eps")
    assert other.returncode != 0
    assert "objective.prediction: 'v' there, 'eps' here" in other.stderr


def test_sample(trained):
    workdir, command = trained
    shown = ["--config.sampler.preview_every=2", "--config.samples.gif=True"]
    smaller = "--config.sampler.batch_size=10"
    succeed(*command, "--mode=sample", "--config.sampler.guidance=cfg(3.0)", *shown, smaller)
    drawn = np.load(workdir / "samples" / "samples.npz")
    assert drawn["x"].shape == (20, 8, 8, 1)
    np.testing.assert_array_equal(drawn["label"], np.arange(20) % 10)
    image = Image.open(workdir / "samples" / "000013.png")
    assert (
        image.size == (8, 8) and image.text["label"] == "3" and image.text["guidance"] == "cfg(3.0)"
    )
    assert (workdir / "samples" / "grid.png").exists()
    names = [f"preview_{batch:03d}_{evaluation:04d}" for batch in (0, 1) for evaluation in (2, 4)]
    assert sorted(p.stem for p in (workdir / "samples").glob("preview*")) == names
    assert Image.open(workdir / "samples" / "trajectory.gif").n_frames > 1


def test_evaluate(trained):
    workdir, command = trained
    text = succeed(
        *command,
        *("--mode=evaluate", "--config.evaluation.count=50"),
        "--config.evaluation.likelihood=bound(draws=3)",
        "--config.evaluation.likelihood_count=20",
        "--config.sampler.corrector=langevin(snr=0.1)",
        "--config.sampler.guidance=('cfg(2)', 'adaptive_projected(momentum=0)', 'interval(0, 3)')",
    )
    assert "recognises" in text and "held-out: " in text and "bits/dim (20 examples" in text
    judged = json.loads((workdir / "evaluation.json").read_text())
    assert judged["num_samples"] == 50
    assert judged["likelihood"]["levels"] == 17 and judged["likelihood"]["given_labels"]
    assert judged["likelihood"]["train"]["bits_per_dim"] > 0


def test_sweep(trained):
    workdir, command = trained
    swept = ["--mode=sweep", "--config.sweep.reference_steps=4", "--config.evaluation.count=50"]
    asked = ["--config.sweep.solvers=('ddim', 'heun')", "--config.sweep.evaluations=(2, 4)"]
    assert "ddim: 4 evaluations (4 steps): frechet" in succeed(*command, *swept, *asked)
    rows = json.loads((workdir / "sweep.json").read_text())["rows"]
    assert [(r["solver"], r["steps"]) for r in rows] == [
        *(("ddim", 2), ("ddim", 4), ("heun", 1), ("heun", 2)),
    ]
    assert "| heun | 1 (1) | 2 (3) |" in (workdir / "sweep.md").read_text()
    assert (workdir / "sweep.png").stat().st_size > 0


def test_learned_solvers_can_be_used(trained):
    workdir, command = trained
    few = [f"--config.learn.{name}=16" for name in ("count", "held_out", "test", "batch_size")]
    few += ["--config.learn.evaluations=(3,)", "--config.learn.iterations=2"]
    few += ["--config.learn.teacher_steps=4", "--config.learn.against=('ddim', 'dpmpp_2m')"]
    text = succeed(*command, "--mode=learn", *few, "--config.learn.grids=('uniform',)")
    assert "3 evaluations:" in text and "dpmpp_2m on uniform" in text
    row = json.loads((workdir / "learned.json").read_text())["rows"][0]
    assert row["learned"] > 0 and len(row["times"]) == 3
    assert (workdir / "learned.png").stat().st_size > 0
    solver = f"--config.sampler.solver=from_file(path='{workdir / 'learned_3.npz'}')"
    succeed(*command, "--mode=sample", solver, "--config.sampler.steps=3")
    refused = run(*command, "--mode=sample", solver)
    assert "config.sampler.solver" in refused.stderr and "set steps=3" in refused.stderr


def test_points(tmp_path):
    small = [
        "--config.train.steps=20",
        "--config.samples.count=500",
        "--config.evaluation.count=500",
        "--config.optimizer.warmup=5",
    ]
    text = succeed(*small, f"--workdir={tmp_path}", config="toy2d")
    assert "sliced Wasserstein" in text
    assert (tmp_path / "density.png").stat().st_size > 0


def test_a_student_of_another_run(tmp_path):
    """Which begins with the parameters of its teacher, in part."""
    small = ["--config.samples.count=200", "--config.evaluation.count=200"]
    small += ["--config.optimizer.warmup=5", "--config.model.mlp.depth=1"]
    teacher, student = (tmp_path / name for name in ("teacher", "student"))
    succeed(*small, f"--workdir={teacher}", "--config.train.steps=10", config="toy2d")
    command = [*small, f"--workdir={student}", f"--config.consistency.teacher={teacher}"]
    command += ["--config.train.init_what=kernel", "--config.train.validate_every=5"]
    text = succeed(*command, "--config.train.steps=10", config="consistency2d")
    assert f"parameter arrays of {teacher}, step 10 (ema)" in text and "are left out" in text
    assert "kernel" in (student / "init_from.txt").read_text()
    assert "sliced Wasserstein" in text
    shutil.rmtree(teacher)  # of which drawing needs nothing
    succeed(*command, "--config.train.steps=10", "--mode=sample", config="consistency2d")
    assert np.load(student / "samples" / "samples.npz")["x"].shape == (200, 2)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--config.train.stepz=3"], "Did you mean config.train.steps?"),
        (
            ["--config.foo=3"],
            "unknown field config.foo; config has autoencoding, consistency, data",
        ),
        (["--config.train.steps=many"], "--config.train.steps=many: invalid literal for int"),
        (["--mode=trian"], "train|sample|evaluate|sweep|learn"),
        (["--config.objective.schedule=cosin"], "Did you mean 'cosine'?"),
        (["--mode=sample"], "no checkpoint"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, arguments, message):
    done = run(f"--workdir={tmp_path / 'run'}", *arguments)
    assert done.returncode != 0
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists(), "a refused command leaves nothing behind"


def test_a_missing_workdir_is_asked_for():
    assert "--workdir" in run().stderr
