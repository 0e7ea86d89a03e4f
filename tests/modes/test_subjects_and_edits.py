"""DreamBooth and InstructPix2Pix as commands: data, what is drawn for them, training, and use."""

import numpy as np
import pytest
import tiny_runs
from commands import command
from PIL import Image

from configs import finetune_lora
from diffusion import pipelines
from diffusion.config import adaptation, latents
from diffusion.config.data import make_images
from diffusion.config.experiment import build
from diffusion.data import edits
from diffusion.objectives import dropout
from diffusion.pipelines.class_pictures import generate_class_pictures
from diffusion.pipelines.request import Request
from diffusion.runs import averages

QUICK = {
    "config.optimizer.name": "sgd",
    "config.optimizer.learning_rate": 0.1,
    "config.optimizer.weight_decay": 0.0,
    "config.optimizer.warmup": 0,
    "config.ema": "constant(decay=0.5)",
    "config.train.batch_size": 8,
    "config.train.steps": 2,
    "config.train.sample_every": 0,
    "config.train.log_every": 1,
    "config.train.checkpoint_every": 1,
    "config.sampler.steps": 2,
    "config.sampler.batch_size": 4,
    "config.samples.columns": 2,
    "config.data.size": 8,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run of latents with a text encoder of its own, and pictures of a subject and of edits."""
    folder = tmp_path_factory.mktemp("base")
    tiny_runs.trained(tiny_runs.captioned(folder), folder / "run")
    rng = np.random.default_rng(0)
    (folder / "subject").mkdir()
    for i in range(3):
        pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).save(folder / "subject" / f"{i}.png")
    images = rng.integers(0, 256, (12, 8, 8, 3), np.uint8)
    captions = np.array(["red", "blue", "black"] * 4)
    np.savez(folder / "edits.npz", images=images, edited=255 - images, caption=captions)
    return folder


def taught(base, workdir, *flags, **options):
    """Runs the command that trains an adapter; (error, printed)."""
    given = QUICK | {"config.model.path": base / "run"}
    given |= {f"config.{name}": value for name, value in options.items()}
    if "--mode=cache" in flags:
        del given["config.samples.columns"]
    flags = [*flags, *(f"--{name}={value}" for name, value in given.items())]
    return command(*flags, f"--workdir={workdir}", config="configs/finetune_lora.py")


def subject(base, folder, **options):
    return {
        "objective.adapter": "full('text/')",
        "objective.terms": "prior_preservation(weight=0.5)",
        "objective.weighting": "min_snr",
        "data.name": "subject",
        "data.dir": base / "subject",
        "data.subject.prompt": "sks cat",
        "data.subject.class_dir": folder / "class",
        "data.subject.class_prompt": "black cat",
        "data.subject.class_count": 5,
    } | options


def editing(base, **options):
    return {
        "objective.adapter": "instruct(channels=2)",
        "objective.label_dropout": 0.05,
        "data.name": "edits",
        "data.dir": base / "edits.npz",
        "data.held_out": 0.3,
    } | options


def test_a_subject_is_learned_beside_its_class(base, tmp_path):
    options = subject(base, tmp_path)
    error, printed = taught(base, tmp_path / "run", "--mode=cache", **options)
    assert error is None, printed
    assert "drawing 5 pictures of the class" in printed
    error, printed = taught(base, tmp_path / "run", **options)
    assert error is None and "drawing" not in printed, printed
    drawn = sorted((tmp_path / "class").iterdir())
    assert [path.name for path in drawn] == [f"{i:06d}.png" for i in range(5)]
    assert Image.open(drawn[3]).text["prompt"] == "black cat"
    log = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "prior_loss" in log and "subject_loss" in log
    assert set(averages.parameters(tmp_path / "run", "params", "newest")[0]) == {"adapter"}


def test_pictures_of_the_class_are_filled_up(base, tmp_path):
    pipeline, params = pipelines.load(base / "run")
    request = Request(steps=2, batch_size=2, seed=3)

    def draw(folder, count):
        made = generate_class_pictures(pipeline, params, "red cat", count, folder, request)
        files = sorted(path for path in folder.iterdir())
        return made, {path.name: np.asarray(Image.open(path)).astype(int) for path in files}

    made, whole = draw(tmp_path / "whole", 5)
    assert made == 5 and len(whole) == 5
    assert draw(tmp_path / "parts", 2)[0] == 2
    made, parts = draw(tmp_path / "parts", 5)
    assert made == 3 and set(parts) == set(whole)
    for name, pixels in whole.items():
        assert np.abs(pixels - parts[name]).max() <= 1  # rounding
    assert draw(tmp_path / "parts", 4)[0] == 0
    (tmp_path / "parts" / "000001.png").unlink()
    made, parts = draw(tmp_path / "parts", 5)
    assert made == 1 and "000005.png" in parts
    with pytest.raises(ValueError, match="was drawn of 'red cat', not of 'blue cat'"):
        generate_class_pictures(pipeline, params, "blue cat", 6, tmp_path / "parts", request)


def test_a_run_learns_to_edit_and_edits(base, tmp_path):
    run = tmp_path / "run"
    for end in (1, 2):  # stopped in between
        error, printed = taught(base, run, **editing(base, **{"train.steps": end}))
        assert error is None, printed
    trained = averages.parameters(run, "params", "newest")[0]["adapter"]
    assert np.any(trained["image/x_embedder/kernel"].reshape(16, 4, -1)[:, 2:])
    assert (run / "samples.png").exists() and (run / "trajectory.png").exists()
    pipeline = pipelines.load(run)[0]
    assert pipeline.edits and pipeline.defaults.guidance == ("instruct(7.5, 1.5)",)
    given = base / "subject" / "1.png"
    edit = ("--mode=generate", "--config.samples.prompt=red", "--config.sampler.steps=2")
    edit += (f"--config.model.path={run}", f"--workdir={tmp_path / 'out'}")
    error, printed = command(*edit, f"--config.samples.image={given}", config=None)
    assert error is None, printed
    assert "edit" in printed and Image.open(tmp_path / "out" / "000000.png").size == (8, 8)
    error, _ = command(*edit, config=None)
    assert "needs it" in error and "image" in error
    error, printed = command(
        "--mode=sample", f"--workdir={run}", "--config.samples.count=3", config=None
    )
    assert error is None, printed


def test_held_out_pictures_are_edited_as_the_network_sees_them(base, tmp_path):
    """Unscaled latents at the posterior's mode, or the pictures themselves."""
    given = edits.read(base / "edits.npz", "test", 0.3).images / np.float32(127.5) - 1
    c = finetune_lora.get_config()
    c.model.path, c.ema = str(base / "run"), "constant(decay=0.5)"
    c.objective.adapter = "instruct(channels=2)"
    c.data.update(name="edits", dir=str(base / "edits.npz"), size=8, held_out=0.3)
    c.train.batch_size = 8
    adaptation.resolve(c, str(tmp_path))
    latents.compute(c.data, lambda split: make_images(c.data, split))
    made = build(c)
    assert made.objective.objective.dropout.func is dropout.instruct
    codec, params = latents.codec(c.data.autoencoder)
    mode = codec.encode(params, given, scaled=False)
    np.testing.assert_allclose(made.drawer.given["image"], mode, atol=1e-5)
    # A run that is trained from scratch in pixels edits too.
    c = tiny_runs.captioned(tmp_path)
    c.data.update(name="edits", dir=str(base / "edits.npz"), size=8, held_out=0.3)
    c.data.autoencoder = c.data.cache = ""
    c.sampler.guidance = "instruct(3.0, 1.5)"
    made = build(c)
    assert made.description.edits and made.pipeline.edits
    np.testing.assert_array_equal(made.drawer.given["image"], given)
    inputs = made.drawer._inputs({}, np.array([1]), *made.drawer.conditioning({}, ["red"]))
    np.testing.assert_array_equal(inputs.cond.image, given[1:2])
    np.testing.assert_array_equal(inputs.middle.image, given[1:2])
    assert not inputs.null.image.any()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"objective.terms": ""}, "need 'prior_preservation(weight=1.0)'"),
        ({"data.subject.class_dir": ""}, "expected both"),
        ({"data.subject.prompt": " "}, "what the subject is called"),
        ({"data.dir": "nowhere"}, "config.data.dir='nowhere': no such folder"),
        ({"data.buckets": "aspect(step=4)"}, "pictures of both are squares"),
        ({"train.batch_size": 4, "train.accumulate": 1, "data.dir": ""}, "config.data.dir must"),
        ({"objective.dropout": "instruct()"}, "the data have no image"),
        ({"objective.dropout": "instrct()"}, "Did you mean 'instruct'"),
        ({"objective.dropout": "together(rate=2.0)"}, "rate must lie in [0, 1]"),
        ({"data.keep_tags": 2}, "keep=2 has no effect"),
    ],
)
def test_mistakes_of_subjects(base, tmp_path, options, expected):
    folder = tmp_path / "class"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / f"{i}.png")
    error, _ = taught(base, tmp_path / "run", **subject(base, tmp_path, **options))
    assert error is not None and expected in error, error
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_mistakes_of_edits(base, tmp_path):
    for options, expected in (
        ({"objective.adapter": "instruct()"}, "expected instruct(channels=4)"),
        ({"data.size": 0}, "config.data.size=0 must be the pictures' side"),
        ({"sampler.guidance": "cfg(3.0)"}, "expected instruct(7.5, 1.5)"),
        ({"objective.terms": "prior_preservation()"}, "needs pictures of the subject's class"),
    ):
        error, _ = taught(base, tmp_path / "run", **editing(base, **options))
        assert error is not None and expected in error, error
