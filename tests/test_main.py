"""Whole commands, as a user types them; and every command that the documents show."""

import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from commands import ROOT, assert_names, command, newest, succeed
from ml_collections import ConfigDict
from PIL import Image

import main
from diffusion.runs import workdir as workdirs

MODELS = [
    *("--config.model.unet.widths=(8, 8)", "--config.model.unet.norm_groups=4"),
    *("--config.model.unet.attention=0", "--config.model.unet.mid_attention=0"),
    *("--config.model.mlp.width=16", "--config.model.mlp.depth=1"),
]
SMALL = [
    *MODELS,
    *("--config.train.steps=20", "--config.train.batch_size=32", "--config.train.log_every=5"),
    *("--config.train.checkpoint_every=10", "--config.optimizer.warmup=5"),
    *("--config.sampler.steps=4", "--config.sampler.batch_size=52", "--config.samples.columns=4"),
    "--config.evaluation.count=100",
]
FEW = {  # what makes a mode quick
    "sample": ["--config.samples.count=20"],
    "evaluate": ["--config.evaluation.count=50"],
    "sweep": [
        *("--config.sweep.reference_steps=4", "--config.evaluation.count=50"),
        *("--config.sweep.solvers=('ddim', 'heun')", "--config.sweep.evaluations=(2, 4)"),
    ],
    "learn": [
        *(f"--config.learn.{name}=16" for name in ("count", "held_out", "test", "batch_size")),
        "--config.learn.learning_rate=0.01",
        *("--config.learn.evaluations=(6,)", "--config.learn.iterations=2"),
        *("--config.learn.teacher_steps=8", "--config.learn.against=('ddim', 'dpmpp_2m')"),
        "--config.learn.grids=('uniform',)",
    ],
}


@pytest.fixture(scope="module", autouse=True)
def place(tmp_path_factory):
    """A folder in which commands run as in the repository, and their runs stay out of it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "configs").symlink_to(ROOT / "configs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def digits(place):
    """A run of 20 steps."""
    more = ["--config.train.validate_every=10", "--config.train.validation_count=64"]
    more += ["--config.train.sample_every=10", "--workdir=runs/digits"]
    succeed(*SMALL, *more, config="configs/digits.py")
    return place / "runs" / "digits"


@pytest.fixture(scope="module")
def points(place):
    printed = succeed(*SMALL, "--workdir=runs/toy2d")
    assert "sliced_wasserstein: " in printed and "(real data " in printed
    return place / "runs" / "toy2d"


@pytest.fixture(scope="module")
def classifier(place):
    small = [*SMALL, "--workdir=runs/digits_classifier", "--config.train.steps=10"]
    assert "accuracy" in succeed(*small, config="configs/digits_classifier.py")
    return place / "runs" / "digits_classifier"


def test_train_leaves_everything(digits):
    for name in ("samples.png", "trajectory.png", "trajectory.gif", "loss.png"):
        assert (digits / name).stat().st_size > 0, name
    for name in ("config.json", "model.json", "starts.jsonl", "parameters.txt", "done"):
        assert (digits / name).stat().st_size > 0, name
    assert list((digits / "tensorboard").glob("events*"))
    assert (digits / "grids" / "step_0000010.png").exists()
    lines = [json.loads(line) for line in (digits / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    assert list(losses) == [5, 10, 15, 20] and losses[20] < losses[5]
    held_out = {line["step"]: line["validation_loss"] for line in lines if len(line) == 3}
    assert list(held_out) == [10, 20] and held_out[20] < held_out[10]
    assert "in all" in (digits / "parameters.txt").read_text()
    judged = json.loads((digits / "evaluation.json").read_text())
    assert 0 <= judged["recognised"] <= 1 and judged["fd_pixels_half_size"] == 100


def test_the_last_pictures_are_in_tensorboard(points):
    written = b"".join(path.read_bytes() for path in (points / "tensorboard").iterdir())
    assert b"samples" in written and b"\x89PNG" in written


def test_a_run_is_done_goes_on_or_is_another(digits):
    again = [*SMALL, "--workdir=runs/digits"]
    assert "already done" in succeed(*again, config="configs/digits.py")
    error, _ = command(*again, "--config.objective.prediction=eps", config="configs/digits.py")
    assert "objective.prediction: 'v' there, 'eps' here" in error
    copy = digits.with_name("longer")
    shutil.copytree(digits, copy)
    (copy / "config.json").unlink()  # each checkpoint has it
    going_on = [*again, "--config.train.steps=24", f"--workdir={copy}"]
    going_on += ["--config.optimizer.clip_norm=0.5"]
    error, _ = command(*going_on, config="configs/digits.py")
    assert "optimizer.clip_norm: 1.0 there, 0.5 here" in error
    assert "config.train.accept_changes=True" in error
    going_on += ["--config.train.accept_changes=True"]
    printed = succeed(*going_on, config="configs/digits.py")
    assert "going on after step 20 of 24" in printed
    assert "note: the learning rate, 0 after 20 steps, rises to" in printed
    assert "although its run had another configuration" in printed


def test_what_drawing_cannot_change_is_refused(digits):
    accepted = "--config.train.accept_changes=True"
    for place in ("--workdir=runs/digits", "--config.model.path=runs/digits"):
        more = ["--mode=sample", place, "--workdir=" + place.partition("=")[2], accepted]
        for field, words in {
            "model.name=dit": "model.name: 'unet' there, 'dit' here",
            "model.unet.widths=(16, 16)": "model.unet.widths: [8, 8] there, [16, 16] here",
            "objective.prediction=eps": "objective.prediction: 'v' there, 'eps' here",
        }.items():
            error, _ = command(*more, f"--config.{field}", config=None)
            if "model.path" in place and field.startswith("model."):
                assert_names(error, field.partition("=")[0], "has no effect")
            else:
                assert words in error and "Drawing cannot change these" in error


def test_sample_needs_no_config(digits):
    shown = ["--config.sampler.preview_every=2", "--config.samples.gif=True"]
    shown += ["--config.sampler.guidance=cfg(3.0)", "--config.sampler.batch_size=12"]
    sample = ["--mode=sample", "--workdir=runs/digits", *FEW["sample"]]
    printed = succeed(*sample, *shown, config=None)
    assert "averaged parameters after step 20" in printed
    place = newest(digits / "samples")
    drawn = np.load(place / "samples.npz")
    assert drawn["x"].shape == (20, 8, 8, 1)
    np.testing.assert_array_equal(drawn["label"], np.arange(20) % 10)
    image = Image.open(place / "pictures" / "000013.png")
    assert image.size == (8, 8) and image.text["label"] == "3"
    assert image.text["guidance"] == "cfg(3.0)"
    assert (place / "grid.png").exists() and len(list((place / "pictures").iterdir())) == 20
    names = [f"{batch:03d}_{evaluation:04d}" for batch in (0, 1) for evaluation in (2, 4)]
    assert sorted(p.stem for p in (place / "previews").iterdir()) == names
    assert Image.open(place / "trajectory.gif").n_frames > 1
    settings = json.loads((place / "settings.json").read_text())
    assert settings["step"] == 20 and settings["sampler"]["average"] == "ema"
    assert settings["sampler"]["guidance"] == ["cfg(3.0)"] and settings["samples"]["count"] == 20
    assert settings["sampler"]["solver"] == "dpmpp_2m" and settings["sampler"]["steps"] == 4

    # Another workdir leaves the run alone; the file's config is the same as the run's own.
    elsewhere = ["--mode=sample", "--config.samples.labels=(7,)", *FEW["sample"]]
    succeed(*elsewhere, "--config.model.path=runs/digits", "--workdir=other", config=None)
    first = np.load(newest(Path("other/samples")) / "samples.npz")
    succeed(*elsewhere, "--workdir=runs/digits", *SMALL, config="configs/digits.py")
    again = np.load(newest(digits / "samples") / "samples.npz")
    assert place.is_dir(), "other settings have another folder"
    np.testing.assert_array_equal(first["x"], again["x"])
    assert set(first["label"]) == {7}


def test_evaluate_needs_no_config(digits):
    before = (digits / "evaluation.json").read_bytes()
    metrics = "('recognition(digits_svc)', 'bits(bound(draws=3), count=20)')"
    printed = succeed(
        *("--mode=evaluate", "--workdir=runs/digits", *FEW["evaluate"]),
        f"--config.evaluation.metrics={metrics}",
        "--config.sampler.corrector=langevin(snr=0.1)",
        "--config.sampler.guidance=('cfg(2)', 'adaptive_projected(momentum=0)', 'interval(0, 3)')",
        config=None,
    )
    assert "recognised: " in printed and "bits_held_out: " in printed
    place = newest(digits / "evaluations")
    judged = json.loads((place / "evaluation.json").read_text())
    assert (digits / "evaluation.json").read_bytes() == before
    assert json.loads(before)["settings"]["evaluation"]["count"] == 100
    used = judged["settings"]["sampler"]
    assert used["corrector"] == "langevin(snr=0.1)" and judged["settings"]["step"] == 20
    assert judged["recognised_real_count"] == 500
    assert judged["bits_train"]["count"] == 20 and judged["bits_train"]["bits_per_dim"] > 0


def test_sweep_needs_no_config(digits):
    seeds = "--config.sweep.seeds=2"
    printed = succeed("--mode=sweep", "--workdir=runs/digits", *FEW["sweep"], seeds, config=None)
    assert "ddim: 4 evaluations (4 steps), seed 1: " in printed
    place = newest(digits / "sweeps")
    rows = json.loads((place / "sweep.json").read_text())["rows"]
    points = [("ddim", 2), ("ddim", 4), ("heun", 1), ("heun", 2)]
    assert [(r["solver"], r["steps"], r["seed"]) for r in rows] == [
        (*point, seed) for seed in (0, 1) for point in points
    ]
    assert rows[0]["rmse"] != rows[4]["rmse"], "another seed is other noise"
    assert "| heun | 1 (1) | 2 (3) |" in (place / "sweep.md").read_text()
    assert (place / "sweep.png").stat().st_size > 0


def test_learned_solvers_can_be_used(digits):
    printed = succeed("--mode=learn", "--workdir=runs/digits", *FEW["learn"], config=None)
    assert "6 evaluations:" in printed and "dpmpp_2m on uniform" in printed
    row = json.loads((digits / "learned.json").read_text())["rows"][0]
    assert row["learned"] > 0 and len(row["times"]) == 6
    assert (digits / "learned.png").stat().st_size > 0
    solver = "--config.sampler.solver=from_file(path='runs/digits/learned_6.npz')"
    sample = ["--mode=sample", "--workdir=runs/digits", solver]
    succeed(*sample, "--config.sampler.steps=6", config=None)
    error, _ = command(*sample, config=None)
    assert "config.sampler.solver" in error and "set steps=6" in error


def test_generate_needs_no_config(digits):
    pictures = ["--config.samples.labels=(3, 5)", "--config.samples.count=2"]
    model = "--config.model.path=runs/digits"
    succeed("--mode=generate", model, *pictures, "--workdir=out", config=None)
    image = Image.open("out/000003.png")
    assert image.size == (8, 8) and image.text["label"] == "5" and image.text["step"] == "20"
    assert [p.name for p in Path("out/grids").iterdir()] == ["000000_000003.png"]
    run = ["--mode=generate", "--workdir=runs/digits", "--config.samples.count=1"]
    succeed(*run, pictures[0], config=None)
    assert len(list((digits / "generated").glob("*.png"))) == 2
    error, _ = command("--mode=generate", model, "--config.samples.labels=(12,)", config=None)
    assert_names(error, "config.samples", "12", "0..9")


def test_a_runs_config_trains_another(digits, place):
    """A config.json is a config; and a run begins with another's parameters, in part."""
    more = ["--config.seed=1", "--config.train.steps=21", "--config.train.validate_every=0"]
    more += ["--config.train.init_from=runs/digits", "--config.train.init_what=down_blocks"]
    more += ["--config.train.init_average=params"]
    more += ["--config.evaluation.metrics=()", "--config.train.sample_every=0"]
    printed = succeed(*more, "--workdir=runs/second", config=digits / "config.json")
    assert "parameter arrays of runs/digits, step 20 (params)" in printed
    assert "are left out" in printed and "21/21" in printed
    assert "down_blocks" in (place / "runs/second/init_from.txt").read_text()
    ours = workdirs.read_config("runs/second")
    assert ours["seed"] == 1 and ours["model"] == workdirs.read_config(digits)["model"]


def test_a_student_of_another_run(points, place):
    """Which begins with the parameters of its teacher, in part; drawing needs no teacher."""
    teacher = shutil.copytree(points, place / "runs" / "teacher")
    small = [*SMALL, "--workdir=runs/student", "--config.few_steps.teacher=runs/teacher"]
    more = ["--config.train.init_what=kernel", "--config.train.validate_every=5"]
    printed = succeed(*small, *more, config="configs/few_steps2d.py:consistency")
    assert "parameter arrays of runs/teacher, step 20 (ema)" in printed
    assert "are left out" in printed and "sliced_wasserstein: " in printed
    assert "kernel" in (place / "runs/student/init_from.txt").read_text()
    shutil.rmtree(teacher)
    succeed("--mode=sample", "--workdir=runs/student", *FEW["sample"], config=None)
    drawn = newest(place / "runs" / "student" / "samples") / "samples.npz"
    assert np.load(drawn)["x"].shape == (20, 2)


def test_a_trained_classifier_judges(digits, classifier):
    judge = "classifier('runs/digits_classifier')"
    metrics = f"--config.evaluation.metrics=recognition({judge}), frechet({judge})"
    few = ["--config.evaluation.count=30", "--mode=evaluate", "--workdir=runs/digits"]
    succeed(*few, metrics, config=None)
    judged = json.loads((newest(digits / "evaluations") / "evaluation.json").read_text())
    (name,) = {key for key in judged if re.fullmatch(r"fd_classifier_[0-9a-f]{8}", key)}
    assert judged[name] > 0 and judged["classifier"] == name.removeprefix("fd_")
    levels = json.loads((classifier / "evaluation.json").read_text())["levels"]
    assert judged["recognised_real"] >= levels[0]["accuracy"] - 0.05  # with less noise
    wrong = "--config.evaluation.metrics=recognition(classifier('runs/digits'))"
    error, _ = command(*few, wrong, config=None)
    assert_names(error, "config.evaluation.metrics", "runs/digits", "expected a classifier")


def test_a_classifier_guides(digits, classifier):
    judged = json.loads((classifier / "evaluation.json").read_text())
    assert judged["num_held_out"] == 500
    guided = "--config.sampler.guidance=classifier('runs/digits_classifier', 2), clip()"
    succeed("--mode=sample", "--workdir=runs/digits", guided, config=None)
    error, _ = command("--mode=sample", "--workdir=runs/digits_classifier", config=None)
    assert_names(error, "classifier", "evaluation.json")


DOCUMENTS = [
    *(ROOT / "main.py", ROOT / "README.md"),
    *sorted(ROOT.glob("*/README.md")),
    *sorted((ROOT / "configs").glob("*.py")),
    *sorted((ROOT / "diffusion" / "modes").glob("*.py")),
    *sorted((ROOT / "colabs").glob("*.ipynb")),
]
PLACEHOLDERS = {
    "--config=...": "--config=configs/digits.py",
    "MODEL": "runs/digits",
    "RUN": "runs/digits",
    "$model": "unet",
    "$prediction": "v",
    "$seed": "0",
}
"""What stands for something else in the documents."""


def documented():
    """Every "python main.py ..." of the documents, with continued lines joined, as words."""
    found = {}
    for path in DOCUMENTS:
        text = path.read_text()
        if path.suffix == ".py":
            text = ast.get_docstring(ast.parse(text)) or ""
        elif path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        text = re.sub(r"\\\n\s*", " ", text)
        for line in re.findall(r"python main\.py ([^\n`]*)", text):
            for placeholder, value in PLACEHOLDERS.items():
                line = re.sub(rf"{re.escape(placeholder)}(?![\w.])", value, line)
            words = shlex.split(line.partition(" && ")[0], comments=True)
            found.setdefault(" ".join(words), words)
    return found


DOCUMENTED = documented()
RUNS = ("runs/digits", "runs/digits_classifier", "runs/toy2d", "runs/few_steps2d")


def is_training(words):
    return not any(word.startswith(("--mode", "--help")) for word in words)


def test_documented_commands_are_found():
    text = "\n".join(DOCUMENTED)
    assert len(DOCUMENTED) > 20 and "\\" not in text
    for name in (
        "--config=configs/digits.py --workdir=runs/digits",
        "--mode=sample",
        "=runs/toy2d",
    ):
        assert name in text


@pytest.fixture(scope="module")
def runs(digits, points, classifier):
    """The runs of the documents, of which only some are trained; others have but a config.json."""
    for name in ("digit.png", "mask.png"):
        Image.new("L", (8, 8), 255).save(name)
    for words in filter(is_training, DOCUMENTED.values()):
        made = main.parse(["main.py", *words])
        if not workdirs.steps(made.workdir) and not made.workdir.startswith("/"):
            workdirs.save_config(made.workdir, made.config.to_dict())


@pytest.mark.parametrize("text", DOCUMENTED)
def test_documented_commands(runs, text):
    """All are understood; those of quick runs are carried out, smaller."""
    words = DOCUMENTED[text]
    if "--help" in words:
        with pytest.raises(SystemExit, match="Configs"):
            main.parse(["main.py", *words])
        return
    made = main.parse(["main.py", *words])
    assert made.mode in main.modes() and isinstance(made.config, ConfigDict)
    model = made.config.model.path or made.workdir
    if made.mode == "generate":
        if model in RUNS:
            label = ["--config.samples.prompt=", "--config.samples.labels=(3,)"]
            succeed(*words, *label, "--workdir=generated", config=None)
        return
    if model not in RUNS:
        return
    named = any(word.startswith("--config=") for word in words)
    small = SMALL if is_training(words) else MODELS if named else []
    if is_training(words) and model == "runs/digits_classifier":
        small = [*small, "--config.train.steps=10"]
    if "configs/finetune_lora.py" in text:  # the small U-Net has no attention
        small = [*small, "--config.objective.adapter=lora(rank=2, targets='all')"]
    few = FEW.get(made.mode, [])
    learned = Path("runs/digits/learned_6.npz").exists()
    if made.mode == "sample" and "from_file" in text and not learned:
        succeed("--mode=learn", "--workdir=runs/digits", *FEW["learn"], config=None)
    succeed(*words, *small, *few, config=None)


def test_help_names_every_mode_and_config():
    with pytest.raises(SystemExit) as end:
        main.parse(["main.py", "--help"])
    for name in ("sample ", "evaluate ", "generate ", "configs/digits.py: Class-conditional"):
        assert name in end.value.code
    assert main.__doc__.strip() in end.value.code and "configs/base.py:" not in end.value.code


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--config=configs/digits.py --workdir=runs/digits trains"),
        (["--mode=train", "--config.model.path=x"], "or --workdir=RUN, which has one"),
        (["--config=digit", "--workdir=new"], "Did you mean configs/digits.py?"),
        (["--config=digits"], "--workdir is needed"),
        (["--config=configs", "--workdir=new"], "the folder holds no run"),
        (["--config=broken.json", "--workdir=new"], "line 2: it is no config.json"),
        (["--config=config.json", "--workdir=new"], "no config of this project"),
        (["--config=digits", "--workdir=new", "--config.model=dit"], "config.model.name=dit?"),
        (["--mode=trian", "--workdir=new"], "--mode=trian: there is no such mode. Did you mean tr"),
        (["--config=configs/digit.py", "--workdir=new"], "Did you mean configs/digits.py?"),
        (["--config=configs/digits.py"], "--workdir is needed"),
        (["--mode=sample"], "--workdir=RUN, or --config.model.path=MODEL"),
        (["--mode=sample", "--workdir=new"], "there is no run in new"),
        (["--mode=inspect", "--workdir=new"], "--mode=inspect needs --config"),
        (
            ["--mode=sample", "--config=configs/digits.py", "--workdir=new"],
            "there is no run in new",
        ),
    ],
)
def test_mistakes_in_what_to_do(arguments, message, place):
    (place / "config.json").write_text('{"_class_name": "UNet2DModel", "sample_size": 8}')
    (place / "broken.json").write_text('{"data":\n tru}')
    error, _ = command(*arguments, config=None)
    assert_names(error, message)


@pytest.mark.parametrize(
    "argument, message",
    [
        ("--config.train.stepz=3", "Did you mean config.train.steps?"),
        (
            "--config.foo=3",
            "unknown field config.foo; config has adapters, autoencoding, compare",
        ),
        ("--config.train=3", "config.train is a section, not a field"),
        ("--config.train.steps=many", "--config.train.steps=many"),
        ("--config.objective.schedule=cosin", "Did you mean 'cosine'?"),
        ("--wrkdir=runs", "wrkdir"),
        ("steps=3", "unexpected arguments: steps=3"),
    ],
)
def test_mistakes_in_fields(argument, message, place):
    error, _ = command("--workdir=new", argument, config="configs/digits.py")
    assert_names(error, message)
    assert not (place / "new").exists(), "a refused command leaves nothing behind"


def test_the_file_itself_runs():
    """A mistake ends the process with one line, before JAX is imported."""
    done = subprocess.run([sys.executable, ROOT / "main.py"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: nothing to do. --config=configs/digits.py")
