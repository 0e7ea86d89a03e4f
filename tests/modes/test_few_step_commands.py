"""Few-step checkpoints by whole commands: folders and names that say what they are, or a family."""

import json
from pathlib import Path

import diffusers
import numpy as np
import pytest
import tiny_pipelines as tiny
from commands import assert_names, command, succeed
from PIL import Image
from safetensors.numpy import save_file

from diffusion.pipelines import memory

XL = {"projection_class_embeddings_input_dim": 24 + 6 * 8, "cross_attention_dim": 64}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: None)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Folders of pipelines, files of networks and of LoRAs, with published names."""
    root = tmp_path_factory.mktemp("checkpoints")
    tiny.whole(folder=root / "sd", scheduler="pndm")
    sdxl = tiny.whole("StableDiffusionXLPipeline", root / "sdxl", scheduler="ddim")
    lora(root / "style.safetensors", tiny.unet())
    lora(root / "sdxl_lightning_4step_lora.safetensors", sdxl.unet)
    for name in ("dmd2_sdxl_4step_unet_fp16", "Hyper-SDXL-1step-Unet"):
        weights = tiny.unet(9, **tiny.SDXL | XL).state_dict()
        save_file({k: v.numpy() for k, v in weights.items()}, root / f"{name}.safetensors")
    lcm = tiny.whole(scheduler="lcm")
    diffusers.LatentConsistencyModelPipeline(
        lcm.vae, lcm.text_encoder, lcm.tokenizer, tiny.unet(5, time_cond_proj_dim=16),
        lcm.scheduler, None, None, requires_safety_checker=False,
    ).save_pretrained(root / "lcm")  # fmt: skip
    turbo = tiny.whole()
    ancestral = diffusers.EulerAncestralDiscreteScheduler
    turbo.scheduler = ancestral(**tiny.BETAS, timestep_spacing="trailing")
    turbo.save_pretrained(root / "turbo")
    pixels = diffusers.UNet2DModel(
        sample_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    scheduler = diffusers.CMStochasticIterativeScheduler()
    diffusers.ConsistencyModelPipeline(pixels, scheduler).save_pretrained(root / "consistency")
    return root


def lora(path, network):
    """A LoRA in kohya's naming, of rank 2, for all attentions."""
    rng, tensors = np.random.default_rng(0), {}
    for name, module in network.named_modules():
        if name.endswith(("to_q", "to_k", "to_v", "to_out.0")):
            stem = f"lora_unet_{name.replace('.', '_')}"
            wide, narrow = module.weight.shape
            for part, shape in (("down", (2, narrow)), ("up", (wide, 2))):
                tensors[f"{stem}.lora_{part}.weight"] = rng.normal(size=shape).astype(np.float32)
            tensors[f"{stem}.alpha"] = np.asarray(1.0, np.float32)
    save_file(tensors, path)


def generated(root, out, *arguments, prompt=True):
    """(the picture's text, what was printed) of a command."""
    words = [f"--config.{a}".replace("ROOT", str(root)) for a in arguments]
    words += ["--config.samples.prompt=a cat"] * prompt
    printed = succeed("--mode=generate", f"--workdir={out}", *words, config="configs/base.py")
    image = Image.open(Path(out) / "000000.png")
    assert np.asarray(image).std() > 1
    return image.text, printed


LORA = "adapters=ROOT/style.safetensors(0.5)"
LIGHTNING = "adapters=ROOT/sdxl_lightning_4step_lora.safetensors"
COMMANDS = [  # model, further arguments, family, evaluations
    ("lcm", [], "lcm()", 4),
    ("sd", [LORA, "model.family=lcm_lora(steps=2)"], "lcm_lora(steps=2)", 2),
    ("sdxl", [LIGHTNING], "lightning(steps=4)", 4),
    ("turbo", [], "turbo()", 1),
    ("sdxl", ["model.network=ROOT/dmd2_sdxl_4step_unet_fp16.safetensors"], "dmd2(steps=4)", 4),
    ("sdxl", ["model.network=ROOT/Hyper-SDXL-1step-Unet.safetensors"], "hyper_unet()", 1),
    ("consistency", [], "consistency()", 1),
    ("turbo", ["model.family=", "sampler.steps=3"], None, 3),
]


@pytest.mark.parametrize(("model", "arguments", "family", "evaluations"), COMMANDS)
def test_pictures(root, tmp_path, model, arguments, family, evaluations):
    path, texts = f"model.path=ROOT/{model}", model != "consistency"
    about, printed = generated(root, tmp_path / "out", path, *arguments, prompt=texts)
    assert about.get("family") == family and about["evaluations"] == str(evaluations)
    shown = family is not None and not any("family" in a for a in arguments)
    assert (f"note: {family}, as the model's files say" in printed) == shown
    assert json.loads(about["settings"])["model"]["path"] == str(root / model)


@pytest.mark.parametrize(
    ("model", "arguments", "names"),
    [
        ("sdxl", [LIGHTNING, "sampler.steps=50"], ["config.sampler.steps=50", "4 steps"]),
        ("sdxl", [LIGHTNING, "sampler.guidance=cfg(5)"], ["config.sampler.guidance", "cfg(1)"]),
        (
            "sdxl",
            [LIGHTNING, "model.family=lightning(steps=8)"],
            ["config.model.family", "sdxl_lightning_4step_lora.safetensors", "steps=4"],
        ),
        ("sdxl", ["model.family=lightning", "model.refiner=ROOT/sdxl"], ["refiner", "lightning"]),
        ("lcm", ["sampler.guidance=()"], ["config.sampler.guidance", "cfg(8.5)"]),
        ("sd", ["model.network=ROOT/sdxl/unet"], ["network=", "context"]),
    ],
)
def test_refused(root, tmp_path, model, arguments, names):
    words = [f"--config.{a}".replace("ROOT", str(root)) for a in arguments]
    words += [f"--config.model.path={root / model}", "--config.samples.prompt=a cat"]
    place = tmp_path / "out"
    error, _ = command("--mode=generate", f"--workdir={place}", *words, config="configs/base.py")
    assert_names(error, *names)
    assert not place.exists()


def test_what_is_inert_is_said(root, tmp_path):
    arguments = [f"model.path={root / 'lcm'}", "samples.negative=blurry"]
    _, printed = generated(root, tmp_path / "out", *arguments)
    assert "note: negative='blurry' has no effect: the network takes guidance's scale" in printed
