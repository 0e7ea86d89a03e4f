"""--mode=generate: what is asked for is checked before weights are read, and then done."""

import json

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
from PIL import Image

from configs import stable_diffusion
from diffusion.modes import request
from diffusion.modes.generate import generate
from diffusion.pipelines import memory


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("pipeline")
    tiny.whole(folder=path)
    return path


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: None)  # or all estimate what they need


def config(folder, **changes):
    c = stable_diffusion.get_config()
    c.model, c.prompt = str(folder), "a cat"
    for name, value in changes.items():
        (c if name in c else c.sampler)[name] = value
    return c


def test_pictures_with_their_settings(folder, tmp_path, capsys):
    c = config(folder, steps=4, count=3, batch_size=2, negative="blurry")
    generate(c, tmp_path / "out")
    paths = sorted((tmp_path / "out").glob("0*.png"))
    assert [p.name for p in paths] == ["000000.png", "000001.png", "000002.png"]
    image = Image.open(paths[2])
    assert image.size == (16, 16)
    assert image.text["prompt"] == "a cat" and image.text["negative"] == "blurry"
    assert image.text["index"] == "2" and image.text["solver"] == "DDIMScheduler"
    assert json.loads(image.text["settings"])["sampler"]["steps"] == 4
    assert Image.open(tmp_path / "out" / "grid.png").width > 3 * 16
    assert "text to image, 3 of 16 x 16" in capsys.readouterr().out
    # One more picture: nothing is overwritten, and the same seed gives the same picture.
    c = config(folder, steps=4, count=2, batch_size=2, negative="blurry")
    generate(c, tmp_path / "out")
    again = np.asarray(Image.open(tmp_path / "out" / "000003.png"))
    np.testing.assert_array_equal(again, np.asarray(Image.open(paths[0])))


def test_acceleration(folder, tmp_path):
    """A refresh at each evaluation is the full sampler; other schedules compile nothing anew."""

    def picture(**changes):
        generate(config(folder, steps=4, count=2, batch_size=2, **changes), tmp_path / "out")
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
        ("autoguidance('run', 2)", r"config\.sampler\.guidance=.*autoguidance is for runs"),
        ("cfg(7.5), rescale(2)", r"config\.sampler\.guidance=.*phi must lie in \[0, 1\]"),
    ],
)
def test_guidance_that_does_not_fit(folder, guidance, message):
    with pytest.raises(ValueError, match=message):
        request.read(config(folder, guidance=guidance))


def image_file(tmp_path, size=(20, 37)):
    path = tmp_path / "picture.png"
    Image.fromarray(np.full((*size, 3), 200, np.uint8)).save(path)
    return str(path)


def test_the_task_follows_from_what_is_given(folder, tmp_path):
    image = image_file(tmp_path)
    assert request.read(config(folder)).task == "text_to_image"
    asked = request.read(config(folder, image=image, strength=0.5, steps=8))
    assert asked.task == "image_to_image" and asked.sampler.solver.evaluations == 4
    assert asked.size == (20, 36) and asked.given["image"].shape == (20, 36, 3)
    asked = request.read(config(folder, image=image, mask=image, strength=1.0))
    assert asked.task == "inpaint" and asked.given["mask"].min() == 1


def test_solvers_of_all_three_kinds(folder):
    own = request.read(config(folder, steps=5))
    other = request.read(
        config(folder, steps=5, solver="EulerDiscreteScheduler(use_karras_sigmas=True)")
    )
    ours = request.read(config(folder, steps=5, solver="dpmpp_2m", grid="karras"))
    assert own.sampler.timesteps[0] == 801
    assert other.sampler.timesteps[1] != own.sampler.timesteps[1]
    assert ours.sampler.grid.sigma.shape == (6,)
    with pytest.raises(ValueError, match=r"config\.sampler\.solver.*use_karras_sigma"):
        request.read(config(folder, solver="EulerDiscreteScheduler(use_karras_sigma=True)"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ""}, "config.model must name"),
        ({"model": "no/such-model"}, "config.model='no/such-model'.*no such folder"),
        ({"prompt": ""}, "config.prompt is empty"),
        ({"dtype": "bf16"}, "config.dtype: unknown 'bf16'.*bfloat16"),
        ({"height": 30}, "config.height=30 must be a multiple of 4 pixels; nearest: 32"),
        ({"steps": 0}, "config.sampler.steps=0 must be at least 1"),
        ({"count": 0}, "config.count=0"),
        ({"labels": (3,)}, "config.labels: .* does not take it"),
        ({"mask": "mask.png"}, "config.image: .*inpaint.* needs it"),
        ({"image": "nothing.png"}, "no such picture: nothing.png"),
        ({"prompts": "nothing.txt", "prompt": ""}, "config.prompts='nothing.txt'"),
        ({"solver": "dpmpp_2n"}, "config.sampler.solver: unknown 'dpmpp_2n'.*dpmpp_2m"),
        ({"solver": "EulerScheduler"}, "unknown 'EulerScheduler'.*EulerDiscreteScheduler"),
        ({"tile": 7}, "7 is not divisible by 2"),
        ({"crop": (1,)}, "config.crop=.* must be two numbers"),
    ],
)
def test_mistakes_are_named(folder, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        request.read(config(folder, **changes))


def test_what_does_not_fit_is_said_in_time(folder, monkeypatch, capsys):
    monkeypatch.setattr(memory, "available", lambda device: 10_000)
    with pytest.raises(ValueError, match=r"not enough memory.*batch_size"):
        request.read(config(folder))
    weights = request.open_pipeline(folder).nbytes
    working = request.open_pipeline(folder).working_bytes((16, 16), 1)
    monkeypatch.setattr(memory, "available", lambda device: weights + int(1.2 * working))
    request.read(config(folder))
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
    asked = request.read(config(tmp_path, image=image_file(tmp_path, (10, 13))))
    assert asked.task == "upscale" and asked.size == (10, 12)


def test_a_single_file_needs_a_tokenizer_too(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    # Not a checkpoint of published size: said before the tokenizer is looked for.
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"config\.model=.*no checkpoint of Stable Diffusion"):
        request.read(config(weights))
    with pytest.raises(FileNotFoundError, match="bpe_simple_vocab_16e6"):
        request._clip_tokenizer("", "!")
    tokenizer = request._clip_tokenizer(str(folder / "tokenizer"), "!")
    assert tokenizer.pad_token == "!"
