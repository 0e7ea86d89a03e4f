"""Pipelines' folders: what diffusers saved runs here, what is saved here runs in diffusers."""

import json

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch

from diffusion.pipelines import draw as drawing
from diffusion.pipelines import load, save_pretrained, tasks
from diffusion.pipelines.from_pretrained import open_pipeline
from diffusion.pretrained.schedulers import from_diffusers
from diffusion.sampling.guidance.links import cfg
from diffusion.sampling.sample import image_keys, image_noise

PROMPTS = ["a photo of a cat", "the small red house at night"]
KEYS = image_keys(0, range(2))
KINDS = ["StableDiffusionPipeline", "StableDiffusionXLPipeline"]


def draw(pipeline, params, negative):
    cond, null = pipeline.conditioner(params, PROMPTS, negative)
    if pipeline.network.added_embedding:
        cond, null = (tasks.micro_conditioning(c, (16, 16)) for c in (cond, null))
    sampler = from_diffusers(pipeline.scheduler, 4)
    inputs = tasks.new(pipeline, cond, null, size=(16, 16))
    latents = drawing.draw(pipeline, params, sampler, KEYS, inputs, (cfg(3.0),))
    return np.asarray(pipeline.codec.decode(params, latents))


def their_draw(pipeline, negative):
    noise = tiny.torch_image(image_noise(KEYS, (8, 8, 4)))
    negative = negative and [negative] * 2
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():
        images = pipeline(
            PROMPTS, negative_prompt=negative, num_inference_steps=4, guidance_scale=3.0,
            height=16, width=16, latents=noise, output_type="np",
        ).images  # fmt: skip
    return tiny.numpy_image(images)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_to_pictures_from_and_to_folders(tmp_path, kind):
    theirs = tiny.whole(kind, tmp_path / "theirs")
    opened = open_pipeline(tmp_path / "theirs")
    pipeline, params = opened.pipeline, opened.load()
    assert opened.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    for negative in (None, "ugly blurry"):
        ours = draw(pipeline, params, negative)
        assert ours.std() > 0.1
        np.testing.assert_allclose(ours, their_draw(theirs, negative), atol=1e-3)

    save_pretrained(tmp_path / "ours", pipeline, params)
    back = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path / "ours", **({} if "XL" in kind else {"safety_checker": None})
    )
    assert type(back).__name__ == kind
    for name in ("unet", "vae", "text_encoder"):
        before, after = getattr(theirs, name).state_dict(), getattr(back, name).state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    np.testing.assert_array_equal(their_draw(back, None), their_draw(theirs, None))
    again, params_again = load(tmp_path / "ours")
    assert again.network == pipeline.network and again.codec == pipeline.codec
    jax.tree.map(np.testing.assert_array_equal, params_again, params)


def test_half_precision(tmp_path):
    tiny.whole(folder=tmp_path)
    opened = open_pipeline(tmp_path, dtype=jnp.bfloat16)
    params = opened.load()
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    half = draw(opened.pipeline, params, None)
    whole = draw(*load(tmp_path), None)
    assert np.isfinite(half).all() and 1e-4 < np.abs(half - whole).mean() < 0.1


def test_what_is_wrong_with_a_folder_is_said_before_weights_are_read(tmp_path):
    tiny.whole(folder=tmp_path)
    index = tmp_path / "model_index.json"
    sound = index.read_text()

    def refused(message, **changes):
        index.write_text(json.dumps(json.loads(sound) | changes))
        with pytest.raises(ValueError, match=message):
            open_pipeline(tmp_path)
        index.write_text(sound)

    refused(
        "StableDiffusionPipelin is not supported.*StableDiffusionPipeline",
        _class_name="StableDiffusionPipelin",
    )
    refused("controlnet", controlnet=["diffusers", "ControlNetModel"])
    refused("a network .* needed", unet=[None, None])
    refused("vae holds .* AutoencoderKL; expected VQModel", vae=["diffusers", "VQModel"])
    config = tmp_path / "scheduler" / "scheduler_config.json"
    good = config.read_text()
    config.write_text(json.dumps(json.loads(good) | {"beta_schedul": "linear"}))
    with pytest.raises(ValueError, match=r"scheduler.*beta_schedul.*did you mean 'beta_schedule'"):
        open_pipeline(tmp_path)
    config.write_text(good)
    weights = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated"):
        open_pipeline(tmp_path)


def test_working_memory_is_of_the_right_size(tmp_path):
    tiny.whole(folder=tmp_path)
    opened = open_pipeline(tmp_path)
    small, large = (opened.working_bytes((side, side), 2) for side in (64, 256))
    assert 8 < large / small < 300  # attention maps grow with the fourth power of the side
    assert open_pipeline(tmp_path, tile=64).working_bytes((256, 256), 2) <= large
