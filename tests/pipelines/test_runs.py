"""A trained run is a pipeline: opened without its data, edited, saved for others."""

import importlib
import sys
from pathlib import Path

import diffusers
import jax
import numpy as np
import pytest
import tiny_runs
import torch
from commands import newest
from PIL import Image

from diffusion import pipelines
from diffusion.conditioning import Conditioning
from diffusion.config.data import make_source
from diffusion.pipelines import draw as drawing
from diffusion.pipelines import guidance, samplers, tasks
from diffusion.pipelines.drawer import Drawer
from diffusion.sampling.sample import image_keys, image_noise

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4
KEYS = image_keys(0, range(BATCH))
LABELS = [3, 1, 4, 1]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(workdir, samples at the end of training, their labels)."""
    workdir = tmp_path_factory.mktemp("run") / "digits"
    return workdir, *tiny_runs.trained(tiny_runs.digits(), workdir)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """(workdir, pictures at the end of training, their captions, the data's folder, config)."""
    folder = tmp_path_factory.mktemp("captioned")
    config = tiny_runs.captioned(folder)
    return folder / "run", *tiny_runs.trained(config, folder / "run"), folder, config


@pytest.fixture
def no_data(monkeypatch):
    """Whoever opens a data set fails."""

    def opened(*_):
        raise AssertionError("a data set was opened")

    for module in ("data", "judging", "experiment"):
        monkeypatch.setattr(f"diffusion.config.{module}.make_source", opened)
    monkeypatch.setattr("diffusion.config.data.stored", opened)


def main(*arguments):
    """The command, in this process."""
    sys.path.insert(0, str(ROOT))
    command = importlib.import_module("main").parse(["main.py", *map(str, arguments)])
    importlib.import_module(f"diffusion.modes.{command.mode}").run(command.config, command.workdir)


def own_drawer(pipeline, **options):
    """A drawer of the pipeline's defaults."""
    sampler = samplers.make(pipeline)
    chain = guidance.make(pipeline, sampler).chain
    return Drawer(pipeline, sampler, chain, **options)


def test_a_run_draws_without_its_data_what_it_drew_in_training(run, no_data):
    workdir, x, labels = run
    pipeline, params = pipelines.load(workdir)
    assert pipeline.kind == "run" and pipeline.defaults.steps == 4
    assert pipeline.defaults.guidance == ("cfg(1.5)", "clip()")
    drawn = own_drawer(pipeline, batch_size=20).draw(params, labels)
    assert len(set(labels)) == 10 and x.std() > 0.1
    np.testing.assert_array_equal(pipeline.codec.decode_all(params, drawn), x)


def test_mode_sample_draws_the_same(run, no_data):
    workdir, x, labels = run
    main("--mode=sample", f"--workdir={workdir}", f"--config.samples.count={len(x)}")
    again = np.load(newest(workdir / "samples") / "samples.npz")
    assert again["label"].tolist() == list(labels) == 2 * list(range(10))
    np.testing.assert_array_equal(again["x"], x)


def picture_and_mask(folder):
    """Files of a picture and a mask of its right half."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
    mask = np.zeros((8, 8), np.uint8)
    mask[:, 4:] = 255
    for name, array in (("picture", pixels), ("mask", mask)):
        Image.fromarray(array).save(folder / f"{name}.png")
    return pixels, folder / "picture.png", folder / "mask.png"


def test_a_run_paints_over_a_part_and_starts_from_a_picture(run, tmp_path, no_data):
    workdir, _, _ = run
    pixels, picture, mask = picture_and_mask(tmp_path)
    pipeline, params = pipelines.load(workdir)
    options = {"image": picture, "steps": 4, "seed": 1, "batch_size": 4}
    painted = pipelines.generate(pipeline, params, "7", mask=mask, strength=1.0, **options)
    painted = np.asarray(painted[0])
    np.testing.assert_array_equal(painted[:, :4], pixels[:, :4])
    assert np.abs(painted[:, 4:].astype(int) - pixels[:, 4:]).mean() > 10
    # The smaller the strength, the nearer is the picture.
    far, near = (
        np.asarray(pipelines.generate(pipeline, params, 7, strength=s, **options)[0]).astype(int)
        for s in (0.75, 0.25)
    )
    away = [np.abs(x - pixels).mean() for x in (far, near)]
    assert 0 < away[1] < away[0]

    out = tmp_path / "out"
    command = ["--mode=generate", f"--config.model.path={workdir}", f"--workdir={out}"]
    command += ["--config.samples.labels=(7,)", "--config.sampler.seed=1"]
    command += [f"--config.samples.image={picture}", "--config.sampler.batch_size=4"]
    main(*command, f"--config.samples.mask={mask}", "--config.samples.strength=1.0")
    main(*command, "--config.samples.strength=0.75")
    made = [Image.open(out / f"00000{i}.png") for i in range(2)]
    np.testing.assert_array_equal(np.asarray(made[0]), painted)
    np.testing.assert_array_equal(np.asarray(made[1]), far)
    assert made[0].text["label"] == "7" and made[0].text["task"] == "repaint"
    assert made[1].text["task"] == "from picture" and made[1].text["solver"] == "dpmpp_2m"


def test_diffusers_draws_from_a_saved_run(run, tmp_path):
    workdir, _, _ = run
    pipeline, params = pipelines.load(workdir)
    folder = tmp_path / "pipeline"
    pipelines.save_pretrained(folder, pipeline, params)
    theirs = diffusers.DDIMPipeline.from_pretrained(folder)
    net, info = diffusers.UNet2DModel.from_pretrained(folder / "unet", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]

    noise, labels = np.asarray(image_noise(KEYS, (8, 8, 1))), torch.tensor(LABELS)
    x = torch.from_numpy(noise.transpose(0, 3, 1, 2).copy())
    cond = Conditioning(label=np.array(LABELS, np.int32))
    time = np.array([999.0, 400.0, 17.0, 0.0], np.float32)
    variables = {"params": params["network"]}
    ours = jax.jit(pipeline.network.apply)(variables, noise, time, cond)
    with torch.no_grad():
        expected = net.eval()(x, torch.from_numpy(time), class_labels=labels).sample
    np.testing.assert_allclose(ours, expected.permute(0, 2, 3, 1).numpy(), atol=1e-4)
    assert np.std(ours) > 0.01

    scheduler = theirs.scheduler
    scheduler.set_timesteps(10)
    with torch.no_grad():
        for t in scheduler.timesteps:
            out = net(x, t, class_labels=labels).sample
            x = scheduler.step(out, t, x, eta=0.0).prev_sample
    expected = x.permute(0, 2, 3, 1).numpy()
    again, params_again = pipelines.load(folder)
    jax.tree.map(np.testing.assert_array_equal, params_again["network"], params["network"])
    assert again.conditioner == pipeline.conditioner and again.shape == pipeline.shape
    assert again.conditioner.count == 10 and again.conditioner.null
    for made, weights in ((pipeline, params), (again, params_again)):
        solver = ("ddim", "uniform") if made is pipeline else ()
        sampler = samplers.make(made, *solver, steps=10)
        inputs = tasks.new(made, made.conditioner(weights, LABELS)[0])
        drawn = drawing.draw(made, weights, sampler, KEYS, inputs)
        np.testing.assert_allclose(drawn, expected, atol=1e-3)


def test_captions_are_encoded_without_the_data(captioned, no_data):
    workdir, images, captions, _, _ = captioned
    pipeline, params = pipelines.load(workdir)
    assert set(captions) <= set(pipeline.conditioner.suggestions)
    drawn = own_drawer(pipeline, batch_size=8).draw(params, captions)
    assert drawn.shape[1:] == pipeline.shape == (4, 4, 2)
    np.testing.assert_array_equal(pipeline.codec.decode_all(params, drawn), images)


def test_a_runs_captions_become_the_datas_tokens(captioned):
    workdir, _, _, _, config = captioned
    pipeline, params = pipelines.load(workdir)
    texts = ["red cat", "", "a photo of a black sea"]
    cond, null = pipeline.conditioner(params, texts)
    data = make_source(config.data, "train").encode([*texts, ""])
    for name, rows in data.items():
        np.testing.assert_array_equal(getattr(cond, name), rows[:3])
        np.testing.assert_array_equal(getattr(null, name), np.repeat(rows[3:], 3, 0))
    assert {"tokens", "context_mask"} <= set(data)


def test_pictures_of_captions_from_pictures(captioned, tmp_path):
    """Latents are made from pictures and back, at the autoencoder's size."""
    workdir, _, _, _, _ = captioned
    _, picture, _ = picture_and_mask(tmp_path)
    pipeline, params = pipelines.load(workdir)
    assert pipeline.unit == 8 and pipeline.size == (8, 8)
    made = pipelines.generate(pipeline, params, "red cat", image=picture, strength=0.5, steps=4)
    assert made[0].size == (8, 8) and made[0].mode == "RGB"
    with pytest.raises(ValueError, match="a text encoder of its own, which no pipeline"):
        pipelines.save_pretrained(tmp_path / "pipeline", pipeline, params)


def test_checkpoints_alone_are_refused(run, tmp_path):
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"a run of an older version .* without model\.json"):
        pipelines.load(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such folder: no/such-run"):
        pipelines.load("no/such-run")
