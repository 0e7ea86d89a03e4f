"""Students of few steps as commands: every method trains, draws, and goes on where it stopped."""

import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
import tiny_runs
from commands import assert_names, command, newest, succeed

from configs import few_steps2d
from diffusion.modes import train
from diffusion.pipelines.from_run import open_run
from diffusion.runs import averages

SMALL = [
    *("--config.model.mlp.width=16", "--config.model.mlp.depth=1", "--config.optimizer.warmup=1"),
    *("--config.train.batch_size=32", "--config.train.log_every=2", "--config.train.steps=4"),
    *("--config.train.checkpoint_every=2", "--config.evaluation.count=100"),
    *("--config.sampler.batch_size=50", "--config.optimizer.name=sgd"),
]
PAIRS = {
    "reflow": "--config.few_steps.method=reflow(count=64, steps=2)",
    "one_step": "--config.few_steps.method=reflow(count=64, steps=2, one_step=True)",
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "toy2d"
    succeed(*SMALL, f"--workdir={path}", "--config.sampler.steps=2")
    return path


def student(teacher, workdir, method, *more):
    """What the command that trains a student printed."""
    given = [*SMALL, f"--workdir={workdir}", f"--config.train.init_from={teacher}", *more]
    if few_steps2d.get_config(method).few_steps.teacher:
        given += [f"--config.few_steps.teacher={teacher}"]
    given += [PAIRS[method]] if method in PAIRS else []
    return command(*given, config=f"configs/few_steps2d.py:{method}")


@pytest.mark.parametrize("method", few_steps2d.METHODS)
def test_every_method_trains_draws_and_goes_on(teacher, tmp_path, method):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    error, printed = student(teacher, whole, method)
    assert error is None, printed
    assert "sliced_wasserstein: " in printed
    error, printed = student(teacher, parts, method, "--config.train.steps=2")
    assert error is None, printed
    error, printed = student(teacher, parts, method)
    assert error is None and "going on after step 2" in printed, printed
    (a, _), (b, _) = (averages.parameters(path, "params", "newest")[:2] for path in (whole, parts))
    # Each start compiles anew here, so that sums may be taken in another order.
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-8), a, b)
    for steps in (1, 2):
        few = ["--config.samples.count=10", f"--config.sampler.steps={steps}"]
        succeed("--mode=sample", f"--workdir={whole}", *few, config=None)
        drawn = newest(whole / "samples") / "samples.npz"
        assert np.isfinite(np.load(drawn)["x"]).all()


def test_a_flow_map_refuses_solvers_with_memory(teacher, tmp_path):
    error, _ = student(teacher, tmp_path / "run", "mean_flow")
    assert error is None
    few = ["--config.samples.count=10", "--config.sampler.solver=dpmpp_2m"]
    more = ["--config.sampler.steps=5", f"--workdir={tmp_path / 'run'}"]
    error, _ = command("--mode=sample", *few, *more, config=None)
    assert "without memory: euler, ddim" in error
    assert_names(error, "config.sampler.solver")


def test_pairs_are_drawn_once(teacher, tmp_path):
    one = student(teacher, tmp_path / "one", "reflow")[1]
    other = student(teacher, tmp_path / "other", "one_step")[1]
    assert "drawing 64 pairs" not in other
    (folder,) = (teacher / "pairs").iterdir()
    noise, x = (np.load(folder / f"{name}.npy") for name in ("noise", "x"))
    run = open_run(teacher)
    assert noise.shape == x.shape == (64, 2) and abs(noise.std() - 1) < 0.2
    assert json.loads((folder / "about.json").read_text())["steps"] == 2
    assert run.path == teacher and one


def test_students_beside_their_teachers_solvers(teacher, tmp_path):
    error, printed = student(teacher, tmp_path / "flow_map", "mean_flow")
    assert error is None, printed
    folder = shutil.copytree(teacher, tmp_path / "teacher")
    few = ["--config.sweep.solvers=('ddim', 'heun')", "--config.sweep.evaluations=(1, 2)"]
    few += ["--config.sweep.reference_steps=4", "--config.evaluation.count=50"]
    few += [f"--config.sweep.students={tmp_path / 'flow_map'}", f"--workdir={folder}"]
    printed = succeed("--mode=sweep", *few, config=None)
    assert "flow_map: euler: 1 evaluations (1 steps), seed 0" in printed
    swept = newest(folder / "sweeps")
    result = json.loads((swept / "sweep.json").read_text())
    by = {(row["solver"], row["evaluations"]): row for row in result["rows"]}
    assert {("flow_map: euler", 1), ("ddim", 2), ("heun", 1)} - set(by) <= {("heun", 1)}
    assert by["flow_map: euler", 1]["rmse"] != by["ddim", 1]["rmse"]
    assert "flow_map" in result["settings"]["students"]
    assert (swept / "sweep.png").exists() and "| flow_map: euler |" in (
        swept / "sweep.md"
    ).read_text()
    error, _ = command(
        "--mode=sweep", *few[:-2], "--config.sweep.students=no", few[-1], config=None
    )
    assert "config.sweep.students='no'" in error


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    path = tmp_path_factory.mktemp("digits") / "digits"
    train.run(tiny_runs.digits(), str(path))
    return path


def distilled(digits, workdir, *more):
    """Of a student of the tiny digits, whose config the run's is."""
    shutil.copy(digits / "config.json", workdir.with_suffix(".json"))
    given = ["--config.objective.name=few_steps", f"--config.few_steps.teacher={digits}"]
    given += [f"--config.train.init_from={digits}", "--config.sampler.guidance=()"]
    config = workdir.with_suffix(".json")
    return command(*given, *more, f"--workdir={workdir}", config=config)


def test_a_student_that_is_told_the_scale(digits, tmp_path):
    """Guidance's scale becomes a condition, which --config.sampler.guidance sets."""
    more = ["--config.model.unet.guidance_width=16", "--config.few_steps.guidance=(1.0, 5.0)"]
    method = "consistency(nodes(10), solver='euler', target='params')"
    guide = "--config.sampler.guidance=cfg(3.0)"
    error, printed = distilled(
        digits, tmp_path / "lcm", *more, f"--config.few_steps.method={method}", guide
    )
    assert error is None, printed
    assert "cond_proj" in printed or "1 are not there" in printed
    few = ["--config.samples.count=4", "--config.sampler.steps=2"]
    for scale in (1.0, 4.0):
        guide = f"--config.sampler.guidance=cfg({scale})"
        succeed("--mode=sample", f"--workdir={tmp_path / 'lcm'}", *few, guide, config=None)


def test_an_adapter_is_a_student_of_its_base(digits, tmp_path):
    """LCM-LoRA: the model beside the adapter teaches it."""
    given = ["--config.model.name=pretrained", f"--config.model.path={digits}"]
    given += ["--config.data.name=digits", "--config.objective.adapter=lora(rank=2)"]
    given += ["--config.objective.name=few_steps", "--config.few_steps.teacher=base"]
    given += ["--config.few_steps.method=consistency(nodes(10), solver='euler', target='params')"]
    given += ["--config.few_steps.guidance=2.0", "--config.train.steps=2"]
    given += ["--config.train.batch_size=8", "--config.sampler.steps=2"]
    given += ["--config.sampler.batch_size=4", "--config.samples.columns=2"]
    given += ["--config.optimizer.warmup=0", f"--workdir={tmp_path / 'lora'}"]
    printed = succeed(*given, config="configs/finetune_lora.py")
    assert "2/2" in printed
    assert (tmp_path / "lora" / "adapter.safetensors").exists()
