"""Each field of model, sampler and samples acts, or it is refused by its name."""

from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
from PIL import Image
from tiny_encoders import clip_text
from tiny_tokenizer import tiny_tokenizer

import main
from configs import base
from diffusion.config import drawing, effects
from diffusion.modes import generate
from diffusion.pipelines import memory

MODES = ("train", "inspect", "profile", "cache", "prepare", *effects.JUDGING)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: None)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of one tiny model of each kind."""
    root = tmp_path_factory.mktemp("models")
    tiny.whole(folder=root / "sd", scheduler="ddim")
    tiny.whole("StableDiffusionXLPipeline", root / "sdxl", scheduler="heun")
    parts = {"vae": tiny.vae(), "scheduler": tiny.SCHEDULERS["ddim"]}
    text = {"text_encoder": clip_text(3), "tokenizer": tiny_tokenizer()}
    added = {"projection_class_embeddings_input_dim": 24 + 5 * 8}
    diffusers.StableDiffusionXLImg2ImgPipeline(
        **parts | {"scheduler": tiny.SCHEDULERS["heun"]},
        unet=tiny.unet(**tiny.SDXL | added),
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=clip_text(4, projection=True, hidden_act="gelu"),
        tokenizer_2=tiny_tokenizer(pad="!"),
        requires_aesthetics_score=True,
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    ).save_pretrained(root / "refiner")
    diffusers.StableDiffusionUpscalePipeline(
        vae=tiny.vae(scaling_factor=0.08333),
        unet=tiny.unet(in_channels=7, num_class_embeds=1000),
        scheduler=parts["scheduler"],
        low_res_scheduler=diffusers.DDPMScheduler(beta_schedule="scaled_linear"),
        **text,
    ).save_pretrained(root / "upscaler")
    diffusers.StableDiffusionInstructPix2PixPipeline(
        **parts,
        unet=tiny.unet(in_channels=8),
        **text,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "instruct")
    diffusers.DiTPipeline(
        tiny.dit(), parts["vae"], parts["scheduler"], {i: f"c{i}" for i in range(1000)}
    ).save_pretrained(root / "dit")
    pixels = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    diffusers.DDPMPipeline(pixels, diffusers.DDPMScheduler()).save_pretrained(root / "ddpm")
    Image.fromarray(np.full((16, 16, 3), 190, np.uint8)).save(root / "picture.png")
    return root


FREE = "sd sdxl refiner upscaler instruct dit ddpm"
TEXTS = "sd sdxl refiner upscaler instruct"
# (field, value) -> the kinds of model for which it acts
TABLE = {
    ("strength", 0.5): "refiner",
    ("noise_level", 30): "upscaler",
    ("weighted", True): TEXTS,
    ("emphasis", "norm"): "",
    ("clip_skip", 1): TEXTS,
    ("original", (32, 32)): "sdxl refiner",
    ("crop", (1, 2)): "sdxl refiner",
    ("aesthetic", (5.0, 1.0)): "refiner",
    ("mask", "picture.png"): "refiner",
    ("fit", "pad"): "refiner upscaler instruct",
    ("paste", False): "",
    ("hand_over", 0.5): "",
    ("negative", "3"): f"{TEXTS} dit",
    ("height", 24): "sd sdxl refiner upscaler instruct ddpm",
    ("width", 24): "sd sdxl refiner upscaler instruct ddpm",
    ("grid", "karras"): "",
    ("steps", 3): FREE,
    ("seed", 3): FREE,
    ("batch_size", 2): FREE,
    ("average", "params"): "",
    ("checkpoint", "best"): "",
    ("revision", "main"): "",
    ("prediction_type", "epsilon"): "",
    ("tokenizer", "x"): "",
    ("vae", "sd/vae"): "sd sdxl refiner instruct dit",  # the upscaler's too, in its own scale
    ("network", "sdxl/unet"): "sdxl",
    ("family", "lightning(steps=4)"): "sdxl refiner",
    ("tile", 16): "sd sdxl refiner upscaler instruct dit",
}


def config(root, kind, **fields):
    c = base.get_config()
    c.model.path = str(root / kind)
    c.sampler.steps = 4
    if kind in TEXTS.split():
        c.samples.prompt = "a cat"
    if kind == "dit":
        c.samples.labels = (3,)
    if kind in ("upscaler", "instruct", "refiner"):
        c.samples.image = str(root / "picture.png")
    for name, value in fields.items():
        section = next(s for s in (c.samples, c.model, c.sampler) if name in s)
        section[name] = value
    return c


WHOLE = drawing.open_model


@cache
def _opened(path):
    return WHOLE(config(Path(path).parent, Path(path).name), path, "")


def opened(c, path, name, network):
    if (c.sampler.average, c.sampler.checkpoint) != ("ema", "newest"):
        return WHOLE(c, path, name, network)
    return _opened(path)


@pytest.mark.parametrize(("name", "value"), TABLE)
def test_a_field_acts_or_is_refused(models, monkeypatch, name, value):
    acting = TABLE[name, value].split()
    given = str(models / value) if name in ("mask", "vae", "network") else value
    if name not in base.get_config().model:  # each folder is checked once
        monkeypatch.setattr(drawing, "open_model", opened)
    for kind in FREE.split():
        c = config(models, kind, **{name: given})
        if kind in acting:
            generate.checked(c)
        elif (name, kind) != ("vae", "upscaler"):
            known = {"negative": "neither labels", "mask": "mask|image"}.get(name, name)
            names = f"size|{name}" if name in ("height", "width") else known
            with pytest.raises(ValueError, match=names):
                generate.checked(c)


def test_every_field_is_in_a_table():
    c = base.get_config()
    always = "prompt labels image count guidance acceleration corrector solver path dtype refiner"
    modes = "gif columns preview_every variant"
    seen = {name for name, _ in TABLE} | set(f"{always} {modes}".split()) | set(effects.BUILT)
    fields = {*c.model, *c.sampler, *c.samples}
    assert fields == seen, fields ^ seen


@pytest.mark.parametrize(
    ("mode", "given", "message"),
    [
        ("train", "samples.image=x.png", "config.samples.image has no effect in --mode=train"),
        ("train", "model.vae=x", "config.model.vae has no effect in --mode=train"),
        ("train", "model.family=tcd()", "config.model.family has no effect in --mode=train"),
        ("generate", "samples.gif=True", "samples.gif has no effect.*it is for sample"),
        ("generate", "sampler.preview_every=2", "preview_every"),
        ("sample", "samples.strength=0.5", "strength"),
        ("sample", "model.refiner=x", "refiner"),
        ("evaluate", "samples.count=5", "samples.count"),
        ("sweep", "sampler.steps=5", "sampler.steps"),
        ("learn", "sampler.corrector=langevin()", "corrector"),
        ("inspect", "sampler.seed=1", "sampler.seed"),
    ],
)
def test_modes_refuse_what_is_for_others(mode, given, message):
    config = "--config=configs/digits.py"
    with pytest.raises(SystemExit, match=message):
        main.parse(["main.py", f"--mode={mode}", config, "--workdir=x", f"--config.{given}"])


def test_each_mode_takes_or_refuses_each_field():
    c = base.get_config()
    for section in ("sampler", "samples"):
        for name in c[section]:
            acting = [m for m in MODES if not _refused(m, f"{section}.{name}")]
            assert acting and set(acting) < set(MODES)
    assert _refused("generate", "model.unet.widths", "model.path")


def _refused(mode, *given):
    try:
        effects.check(mode, given)
    except ValueError:
        return True
    return False


def test_the_refiner_by_command(models, tmp_path, capsys):
    """Also an empty prompt and another autoencoder, as they are typed."""
    out = str(tmp_path / "out")
    main.main([
        "main.py", "--mode=generate", f"--workdir={out}", f"--config.model.path={models}/sdxl",
        f"--config.model.refiner={models}/refiner", "--config.samples.prompt=",
        "--config.sampler.steps=4", "--config.sampler.hand_over=0.5",
        "--config.samples.aesthetic=(5.0,2.0)", f"--config.model.vae={models}/sd/vae",
    ])  # fmt: skip
    image = Image.open(tmp_path / "out" / "000000.png")
    assert image.size == (16, 16) and image.text["evaluations"] == "8"
