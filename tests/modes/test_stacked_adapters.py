"""A LoRA, a word, a ControlNet and an IP-Adapter at once, by command."""

import diffusers
import numpy as np
import pytest
import tiny_ip_adapters as tiny_ip
import tiny_pipelines as tiny
import torch
from commands import succeed
from PIL import Image
from safetensors.torch import save_file
from tiny_encoders import clip_vision, randomise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pipeline, and one of each for it."""
    at = tmp_path_factory.mktemp("stack")
    base = tiny.whole(folder=at / "base")
    generator = torch.Generator().manual_seed(0)
    stem = "lora_unet_conv_in"
    width = base.unet.config.block_out_channels[0]
    lora = {
        f"{stem}.lora_down.weight": torch.randn(2, 4, 3, 3, generator=generator),
        f"{stem}.lora_up.weight": torch.randn(width, 2, 1, 1, generator=generator),
    }
    save_file(lora, at / "style.safetensors")
    hidden = base.text_encoder.config.hidden_size
    save_file({"<w>": torch.randn(2, hidden, generator=generator)}, at / "word.safetensors")
    net = diffusers.ControlNetModel.from_unet(
        base.unet, conditioning_embedding_out_channels=(8, 16)
    )
    randomise(net, 11).save_pretrained(at / "net")
    save_file(tiny_ip.adapter(base.unet), at / "ip.safetensors")
    clip_vision().save_pretrained(at / "encoder")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    Image.fromarray(pixels).save(at / "x.png")
    return at


def picture(at, name, prompt="a <w> cat", lora=1.0, control=1.0, image=1.0, word=True):
    adapters = [f"{at}/style.safetensors({lora})", *([f"{at}/word.safetensors"] if word else [])]
    prompts = f"'{at}/ip.safetensors', '{at}/x.png', {image}, encoder='{at}/encoder'"
    succeed(
        "--mode=generate",
        f"--workdir={at / name}",
        f"--config.model.path={at / 'base'}",
        f"--config.samples.prompt={prompt}",
        f"--config.adapters={tuple(adapters)!r}",
        f"--config.control=canny(net='{at}/net', image='{at}/x.png', scale={control})",
        f"--config.image_prompts=ip_adapter({prompts})",
        "--config.sampler.steps=2",
        config=None,
    )
    return np.asarray(Image.open(at / name / "000000.png"), np.int32)


def test_each_of_four_acts_beside_the_others(folder):
    whole = picture(folder, "all")
    assert (folder / "all" / "000000_canny.png").exists()
    for name, changes in {
        "lora": {"lora": 0.0},
        "control": {"control": 0.0},
        "image": {"image": 0.0},
        "word": {"prompt": "a cat"},
    }.items():
        assert np.any(picture(folder, name, **changes) != whole), name
    off = {"lora": 0.0, "control": 0.0, "image": 0.0, "prompt": "a cat"}
    none = picture(folder, "none", **off, word=False)
    succeed(
        "--mode=generate",
        f"--workdir={folder / 'plain'}",
        f"--config.model.path={folder / 'base'}",
        "--config.samples.prompt=a cat",
        "--config.sampler.steps=2",
        config=None,
    )
    plain = np.asarray(Image.open(folder / "plain" / "000000.png"), np.int32)
    np.testing.assert_array_equal(none, plain)
