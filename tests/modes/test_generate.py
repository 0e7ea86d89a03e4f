"""--mode=generate: what is asked for is checked before weights are read, and then done."""

import json

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
from PIL import Image

from configs import base
from diffusion.modes import generate
from diffusion.pipelines import memory
from diffusion.pipelines.from_pretrained import open_pipeline
from diffusion.pipelines.tokenizers import clip_tokenizer_at


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    tiny.whole(folder=path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: None)  # or all estimate what they need


def config(folder, **changes):
    c = base.get_config()
    c.model.path, c.samples.prompt = str(folder), "a cat"
    for name, value in changes.items():
        section = next(s for s in (c.samples, c.model, c.sampler) if name in s)
        section[name] = value
    return c


def checked(folder, **changes):
    """What is to be made."""
    return generate.checked(config(folder, **changes))[2]


def test_pictures_with_their_settings(folder, tmp_path, capsys):
    c = config(folder, steps=4, count=3, batch_size=2, negative="blurry")
    generate.run(c, str(tmp_path / "out"))
    paths = sorted((tmp_path / "out").glob("0*.png"))
    assert [p.name for p in paths] == ["000000.png", "000001.png", "000002.png"]
    image = Image.open(paths[2])
    assert image.size == (16, 16)
    assert image.text["prompt"] == "a cat" and image.text["negative"] == "blurry"
    assert image.text["index"] == "2" and image.text["solver"] == "DDIMScheduler"
    assert json.loads(image.text["settings"])["sampler"]["steps"] == 4
    assert Image.open(tmp_path / "out" / "grids" / "000000_000002.png").width > 3 * 16
    assert "StableDiffusionPipeline, new, 3 of 16 x 16 pixels" in capsys.readouterr().out
    # One more picture: nothing is overwritten, and the same seed gives the same picture.
    c = config(folder, steps=4, count=2, batch_size=2, negative="blurry")
    generate.run(c, str(tmp_path / "out"))
    again = np.asarray(Image.open(tmp_path / "out" / "000003.png"))
    np.testing.assert_array_equal(again, np.asarray(Image.open(paths[0])))


def test_acceleration(folder, tmp_path):
    """A refresh at each evaluation is the full sampler; other schedules compile nothing anew."""

    def picture(**changes):
        generate.run(
            config(folder, steps=4, count=2, batch_size=2, **changes), str(tmp_path / "out")
        )
        last = sorted((tmp_path / "out").glob("0*.png"))[-1]
        return np.asarray(Image.open(last), np.int32)

    full = picture(negative="blurry")
    same = picture(negative="blurry", acceleration="cache(every(1))")
    assert np.abs(same - full).max() <= 1
    other = picture(negative="blurry", acceleration="cache(every(4))")
    assert np.abs(other - full).max() > 1
    with pytest.raises(ValueError, match=r"acceleration=.*keep=9.*skip connections"):
        picture(acceleration="cache(every(2), keep=9)")


@pytest.mark.parametrize(
    "guidance, message",
    [
        (7.5, r"config\.sampler\.guidance=7.5: expected texts such as 'cfg\(7.5\)'"),
        ("instruct(7.5, 1.5)", r"config\.sampler\.guidance=.*instruct is for networks that edit"),
        ("autoguidance('run', 2)", r"config\.sampler\.guidance=.*run is not the workdir of a run"),
        ("cfg(7.5), rescale(2)", r"config\.sampler\.guidance=.*phi must lie in \[0, 1\]"),
    ],
)
def test_guidance_that_does_not_fit(folder, guidance, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        checked(folder, guidance=guidance)


def image_file(tmp_path, size=(20, 37)):
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((*size, 3), 200, np.uint8)).save(path)
    return str(path)


def test_the_task_follows_from_what_is_given(folder, tmp_path):
    image = image_file(tmp_path)
    assert checked(folder).task == "new"
    made = checked(folder, image=image, strength=0.5, steps=8)
    assert made.task == "from picture" and made.drawer.sampler.solver.evaluations == 4
    assert made.size == (20, 36) and made.given["image"].shape == (20, 36, 3)
    made = checked(folder, image=image, mask=image, strength=1.0)
    assert made.task == "repaint" and made.given["mask"].min() == 1


def test_solvers_of_all_three_kinds(folder):
    own = checked(folder, steps=5)
    other = checked(folder, steps=5, solver="EulerDiscreteScheduler(use_karras_sigmas=True)")
    ours = checked(folder, steps=5, solver="dpmpp_2m", grid="karras")
    assert own.drawer.sampler.timesteps[0] == 801
    assert other.drawer.sampler.timesteps[1] != own.drawer.sampler.timesteps[1]
    assert ours.drawer.sampler.grid.sigma.shape == (6,)
    with pytest.raises(ValueError, match=r"config\.sampler\.solver.*use_karras_sigma"):
        checked(folder, solver="EulerDiscreteScheduler(use_karras_sigma=True)")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "config.model.path='': expected a run's workdir, a diffusers folder"),
        ({"path": "no/such-model"}, "config.model.path='no/such-model'.*no such folder"),
        ({"prompt": None}, "config.samples: prompt: say what should be in the picture"),
        ({"dtype": "bf16"}, "config.model.dtype: unknown 'bf16'.*bfloat16"),
        ({"height": 31}, "config.samples: height=31 must be a multiple of 2; nearest: 32"),
        ({"steps": -1}, "config.sampler.steps.*-1"),
        ({"count": -1}, "config.samples.count.*-1"),
        ({"labels": (3,)}, "config.samples.prompt and config.samples.labels: give one"),
        ({"labels": (3,), "prompt": None}, "config.samples: .*prompts, which are texts, got 3"),
        ({"mask": "mask.png"}, "config.samples: image: .*repaint.* needs it"),
        ({"image": "nothing.png"}, "no such picture: nothing.png"),
        ({"prompt": "@nothing.txt"}, "config.samples.prompt='@nothing.txt'"),
        ({"solver": "dpmpp_2n"}, "config.sampler.solver: unknown 'dpmpp_2n'.*dpmpp_2m"),
        ({"solver": "EulerScheduler"}, "unknown 'EulerScheduler'.*EulerDiscreteScheduler"),
        ({"tile": 7}, "7 is not divisible by 2"),
        ({"crop": (1,)}, r"config.samples: crop=\(1,\) has no effect.*SDXL"),
        ({"original": (64, 64)}, r"original=\(64, 64\) .*is for SDXL"),
    ],
)
def test_mistakes_are_named(folder, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        checked(folder, **changes)


def test_what_does_not_fit_is_said_in_time(folder, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda device: 10_000)
    with pytest.raises(ValueError, match=r"not enough memory.*batch_size"):
        checked(folder)
    opened = open_pipeline(folder)
    weights, working = opened.nbytes, opened.working_bytes((16, 16), 1)
    monkeypatch.setattr(memory, "available", lambda device: weights + int(1.2 * working))
    checked(folder)
    assert "memory may not suffice" in capsys.readouterr().out


def test_an_upscaler_takes_the_picture_as_it_is(tmp_path, monkeypatch):
    low_res = diffusers.DDPMScheduler(beta_schedule="scaled_linear")
    diffusers.StableDiffusionUpscalePipeline(
        vae=tiny.vae(scaling_factor=0.08333),
        unet=tiny.unet(in_channels=7, num_class_embeds=1000),
        scheduler=tiny.SCHEDULERS["ddim"],
        low_res_scheduler=low_res,
        text_encoder=tiny.clip_text(3),
        tokenizer=tiny.tiny_tokenizer(),
    ).save_pretrained(tmp_path)
    monkeypatch.setattr(memory, "available", lambda device: 2**40)
    made = checked(tmp_path, image=image_file(tmp_path, (10, 13)))
    assert made.task == "upscale" and made.size == (10, 13)


def test_a_single_file_needs_a_tokenizer_too(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Not a checkpoint of published size: said before the tokenizer is looked for.
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"config\.model\.path=.*no checkpoint of Stable"):
        checked(weights)
    with pytest.raises(FileNotFoundError, match="bpe_simple_vocab_16e6"):
        clip_tokenizer_at("", "!")
    tokenizer = clip_tokenizer_at(str(folder / "tokenizer"), "!")
    assert tokenizer.pad_token == "!"
