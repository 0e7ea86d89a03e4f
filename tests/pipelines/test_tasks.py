"""Every pipeline against diffusers': the same weights, prompts and noise give the same picture."""

from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch

from diffusion.conditioning import Conditioning
from diffusion.models.unet import UNet
from diffusion.pipelines import tasks
from diffusion.pipelines.pipeline import Pipeline
from diffusion.pretrained import autoencoder_kl, names
from diffusion.pretrained.schedulers import from_diffusers
from diffusion.sampling.sample import image_keys, image_noise

BATCH, TOLERANCE = 2, 1e-3
KEYS = image_keys(0, range(BATCH))
NOISE = np.asarray(image_noise(KEYS, (8, 8, 4)))
RNG = np.random.default_rng(0)
CONTEXT, NULL = RNG.normal(size=(2, BATCH, 5, 32)).astype(np.float32)
IMAGES = RNG.uniform(-1, 1, (BATCH, tiny.SIZE, tiny.SIZE, 3)).astype(np.float32)
MASK = np.zeros((BATCH, tiny.SIZE, tiny.SIZE, 1), np.float32)
MASK[0, 3:11, 2:9], MASK[1, :, 8:] = 1, 1


def params_of(table, module, example, model):
    shapes = jax.eval_shape(module.init, jax.random.key(0), *example)["params"]
    state = {k: v.numpy() for k, v in model.state_dict().items()}
    return names.from_tensors(table, shapes, state)


@cache
def autoencoder(**fields):
    theirs = tiny.vae(**fields)
    ours = autoencoder_kl.from_config(theirs.config)
    table = autoencoder_kl.names(ours)
    return theirs, ours, params_of(table, ours, autoencoder_kl.example(ours), theirs)


@cache
def unet(in_channels=4, **fields):
    theirs = tiny.unet(in_channels=in_channels, **fields)
    ours = UNet(
        widths=(16, 32), blocks=1, attention=(1, 0), mid_attention=1, num_heads=2, norm_groups=8,
        out_channels=4,
    )  # fmt: skip
    image = jax.ShapeDtypeStruct((1, 8, 8, in_channels - 4), jnp.float32)
    cond = Conditioning(
        context=jax.ShapeDtypeStruct((1, 5, 32), jnp.float32),
        image=image if in_channels > 4 else None,
    )
    x, t = jax.ShapeDtypeStruct((1, 8, 8, 4), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    table = names.Names(names.dotted("linear_1", "linear_2"))
    return theirs, ours, params_of(table, ours, (x, t, cond), theirs)


def both(kind, scheduler, in_channels=4, **components):
    """(their pipeline, ours, our parameters)."""
    their_unet, our_unet, unet_params = unet(in_channels)
    their_vae, our_vae, vae_params = autoencoder()
    scheduler = tiny.SCHEDULERS[scheduler]
    theirs = getattr(diffusers, kind)(
        vae=their_vae, unet=their_unet, scheduler=scheduler, text_encoder=None, tokenizer=None,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False, **components,
    )  # fmt: skip
    theirs.set_progress_bar_config(disable=True)
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    ours = Pipeline(kind, our_unet, our_vae, config, in_channels, (8, 8))
    return theirs, ours, {"network": unet_params, "autoencoder": vae_params}


def prompts(guided=True):
    """(theirs, ours)."""
    theirs = {"prompt_embeds": torch.from_numpy(CONTEXT), "output_type": "np"}
    cond, null = Conditioning(context=jnp.asarray(CONTEXT)), Conditioning(context=jnp.asarray(NULL))
    if guided:
        theirs |= {"negative_prompt_embeds": torch.from_numpy(NULL), "guidance_scale": 3.0}
        return theirs, (cond, null)
    return theirs | {"guidance_scale": 1.0}, (cond, None)


def run(theirs, ours, scheduler, given, image_noises=(), strength=None):
    """(their pictures, our sampler)."""
    steps = tiny.STEPS.get(scheduler, 4 if strength is None else 8)
    sampler = from_diffusers(ours.scheduler, steps, strength=strength)
    assert sampler.solver.evaluations == 4
    drawn = list(image_noises)
    if scheduler == "ancestral":  # draws at every step
        drawn += [image_noise(KEYS, (8, 8, 4), r + 1) for r in range(4)]
    with torch.no_grad(), tiny.noises(*drawn):
        return theirs(**given, num_inference_steps=steps).images, sampler


def posterior_noise(fold=tasks.POSTERIOR):
    return image_noise(tasks._folded(KEYS, fold), (8, 8, 4))


def assert_same(pipeline, params, latents, theirs):
    ours = np.asarray(tasks.decode(pipeline, params, latents))
    theirs = tiny.numpy_image(theirs)
    assert ours.std() > 0.1 and np.mean(np.abs(ours) < 1) > 0.5, "the picture is saturated or flat"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("scheduler", tiny.SCHEDULERS)
def test_text_to_image(scheduler):
    theirs, ours, params = both("StableDiffusionPipeline", scheduler)
    given, prompt = prompts()
    given |= {"height": 16, "width": 16, "latents": tiny.torch_image(NOISE)}
    expected, sampler = run(theirs, ours, scheduler, given)
    latents = tasks.text_to_image(ours, params, sampler, KEYS, *prompt, scale=3.0)
    assert_same(ours, params, latents, expected)


def test_text_to_image_unguided_and_rescaled():
    theirs, ours, params = both("StableDiffusionPipeline", "ddim")
    size = {"height": 16, "width": 16, "latents": tiny.torch_image(NOISE)}
    for guided, rescale in ((False, 0.0), (True, 0.7)):
        given, prompt = prompts(guided)
        given |= size | {"guidance_rescale": rescale}
        expected, sampler = run(theirs, ours, "ddim", given)
        latents = tasks.text_to_image(
            ours, params, sampler, KEYS, *prompt, scale=3.0, rescale=rescale
        )
        assert_same(ours, params, latents, expected)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "euler", "ancestral"])
def test_image_to_image(scheduler):
    theirs, ours, params = both("StableDiffusionImg2ImgPipeline", scheduler)
    given, prompt = prompts()
    given |= {"image": tiny.torch_image(IMAGES), "strength": 0.5}
    expected, sampler = run(
        theirs, ours, scheduler, given, [posterior_noise(), NOISE], strength=0.5
    )
    latents = tasks.image_to_image(ours, params, sampler, KEYS, *prompt, IMAGES, scale=3.0)
    assert_same(ours, params, latents, expected)


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "euler", "ancestral", "pndm"])
@pytest.mark.parametrize("channels", [4, 9])
def test_inpaint(channels, scheduler, strength):
    if strength and scheduler == "pndm":
        pytest.skip("three of its steps are four evaluations, but not half of eight")
    theirs, ours, params = both("StableDiffusionInpaintPipeline", scheduler, channels)
    given, prompt = prompts()
    given |= {"image": tiny.torch_image(IMAGES), "mask_image": tiny.torch_image(MASK)}
    given |= {"height": 16, "width": 16, "strength": strength or 1.0}
    drawn = [posterior_noise()] if channels == 4 or strength else []
    masked = np.asarray(
        image_noise(tasks._folded(tasks._folded(KEYS, tasks.MASKED), tasks.POSTERIOR), (8, 8, 4))
    )
    expected, sampler = run(
        theirs, ours, scheduler, given, [*drawn, NOISE, masked], strength=strength
    )
    latents = tasks.inpaint(
        ours, params, sampler, KEYS, *prompt, IMAGES, MASK, strength=strength or 1.0, scale=3.0
    )
    assert_same(ours, params, latents, expected)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "euler", "ancestral"])
def test_instruct(scheduler):
    theirs, ours, params = both("StableDiffusionInstructPix2PixPipeline", scheduler, 8)
    given, (cond, null) = prompts()
    given |= {"image": tiny.torch_image(IMAGES), "image_guidance_scale": 1.5}
    given["latents"] = tiny.torch_image(NOISE)
    expected, sampler = run(theirs, ours, scheduler, given)
    latents = tasks.instruct(
        ours, params, sampler, KEYS, cond, null, IMAGES, scale=3.0, image_scale=1.5
    )
    assert_same(ours, params, latents, expected)
