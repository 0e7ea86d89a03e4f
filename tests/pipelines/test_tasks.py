"""Every pipeline against diffusers': the same weights, prompts and noise give the same picture."""

import inspect
from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch

from diffusion.conditioning import Conditioning
from diffusion.pipelines import samplers, tasks
from diffusion.pipelines.codec import POSTERIOR, folded
from diffusion.pipelines.draw import check_batch, draw
from diffusion.pipelines.from_pretrained import assemble
from diffusion.pretrained import names
from diffusion.pretrained.networks import autoencoder_kl, dit, unet
from diffusion.sampling.guidance.links import cfg, instruct, rescale
from diffusion.sampling.sample import image_keys, image_noise

BATCH, TOLERANCE = 2, 1e-3
KEYS = image_keys(0, range(BATCH))
CFG = (cfg(3.0),)
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


def converted(theirs, table):
    """(theirs, our module, our parameters)."""
    config = {**theirs.config, "_class_name": type(theirs).__name__}
    ours = table.from_config(config)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), *table.example(ours))["params"]
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    return theirs, ours, names.from_tensors(table.names(ours), shapes, state)


@cache
def autoencoder(scaling_factor):
    return converted(tiny.vae(scaling_factor=scaling_factor), autoencoder_kl)


@cache
def network(channels=4, kind="sd"):
    if kind == "dit":
        return converted(tiny.dit(), dit)
    added = {"sd": {}, "upscaler": {"num_class_embeds": 1000}, "lcm": {"time_cond_proj_dim": 16}}
    added["sdxl"] = tiny.SDXL | {"projection_class_embeddings_input_dim": 24 + 6 * 8}
    added["refiner"] = tiny.SDXL | {"projection_class_embeddings_input_dim": 24 + 5 * 8}
    return converted(tiny.unet(in_channels=channels, **added[kind]), unet)


def both(cls, scheduler, channels=4, kind="sd", **components):
    """(their pipeline, ours, our parameters)."""
    their_net, our_net, net_params = network(channels, kind)
    # The upscaler's pipeline writes its own factor into any other autoencoder.
    their_vae, our_vae, vae_params = autoencoder(0.08333 if kind == "upscaler" else 0.5)
    scheduler = tiny.SCHEDULERS[scheduler]
    scheduler = type(scheduler).from_config(scheduler.config)  # pipelines change what they get
    cls = getattr(diffusers, cls)
    accepted = inspect.signature(cls.__init__).parameters
    given = {"vae": their_vae, "unet": their_net, "transformer": their_net} | components
    given |= {"scheduler": scheduler, "requires_safety_checker": False, "add_watermarker": False}
    rest = {name: None for name, p in accepted.items() if p.default is p.empty and name != "self"}
    theirs = cls(**rest | {name: value for name, value in given.items() if name in accepted})
    theirs.set_progress_bar_config(disable=True)
    config = {**scheduler.config, "_class_name": type(scheduler).__name__}
    low_res = components.get("low_res_scheduler")
    low_res = low_res and {**low_res.config, "_class_name": type(low_res).__name__}
    ours = assemble(cls.__name__, our_net, our_vae, config, low_res=low_res)
    return theirs, ours, {"network": net_params, "autoencoder": vae_params}


def prompts(guided=True):
    """(theirs, ours)."""
    theirs = {"prompt_embeds": torch.tensor(CONTEXT), "output_type": "np"}
    cond, null = Conditioning(context=jnp.asarray(CONTEXT)), Conditioning(context=jnp.asarray(NULL))
    if guided:
        theirs |= {"negative_prompt_embeds": torch.tensor(NULL), "guidance_scale": 3.0}
        return theirs, (cond, null)
    return theirs | {"guidance_scale": 1.0}, (cond, None)


def run(theirs, ours, scheduler, given, image_noises=(), strength=None):
    """(their pictures, our sampler)."""
    steps = given.pop("steps", tiny.STEPS.get(scheduler, 4 if strength is None else 8))
    sampler = samplers.make(ours, steps=steps, strength=strength)
    assert sampler.solver.evaluations == 4
    drawn = list(image_noises)
    if scheduler == "ancestral":  # draws at every step
        drawn += [image_noise(KEYS, (8, 8, 4), r + 1) for r in range(4)]
    with torch.no_grad(), tiny.noises(*drawn):
        return theirs(**given, num_inference_steps=steps).images, sampler


def posterior_noise(fold=POSTERIOR):
    return image_noise(folded(KEYS, fold), (8, 8, 4))


def assert_same(pipeline, params, latents, theirs):
    ours = np.asarray(pipeline.codec.decode(params, latents))
    theirs = tiny.numpy_image(theirs)
    assert ours.std() > 0.1 and np.mean(np.abs(ours) < 1) > 0.5, "the picture is saturated or flat"
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "euler", "ancestral", "pndm", "v"])
def test_text_to_image(scheduler):
    theirs, ours, params = both("StableDiffusionPipeline", scheduler)
    given, prompt = prompts()
    given |= {"height": 16, "width": 16, "latents": tiny.torch_image(NOISE)}
    expected, sampler = run(theirs, ours, scheduler, given)
    latents = draw(ours, params, sampler, KEYS, tasks.new(ours, *prompt), CFG)
    assert_same(ours, params, latents, expected)


def test_text_to_image_unguided_and_rescaled():
    theirs, ours, params = both("StableDiffusionPipeline", "ddim")
    size = {"height": 16, "width": 16, "latents": tiny.torch_image(NOISE)}
    for guided, phi in ((False, 0.0), (True, 0.7)):
        given, prompt = prompts(guided)
        given |= size | {"guidance_rescale": phi}
        expected, sampler = run(theirs, ours, "ddim", given)
        chain = (cfg(3.0), rescale(phi))
        latents = draw(ours, params, sampler, KEYS, tasks.new(ours, *prompt), chain)
        assert_same(ours, params, latents, expected)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "euler", "ancestral"])
def test_image_to_image(scheduler):
    theirs, ours, params = both("StableDiffusionImg2ImgPipeline", scheduler)
    given, prompt = prompts()
    given |= {"image": tiny.torch_image(IMAGES), "strength": 0.5}
    expected, sampler = run(
        theirs, ours, scheduler, given, [posterior_noise(), NOISE], strength=0.5
    )
    inputs = tasks.from_picture(ours, params, KEYS, *prompt, IMAGES)
    latents = draw(ours, params, sampler, KEYS, inputs, CFG)
    assert_same(ours, params, latents, expected)


WHOLLY = [(name, None) for name in ("ddim", "dpm", "euler", "ancestral", "pndm")]
PARTLY = [(name, 0.5) for name in ("ddim", "dpm", "euler", "ancestral")]


@pytest.mark.parametrize(("scheduler", "strength"), [*WHOLLY, *PARTLY])
@pytest.mark.parametrize("channels", [4, 9])
def test_inpaint(channels, scheduler, strength):
    theirs, ours, params = both("StableDiffusionInpaintPipeline", scheduler, channels)
    given, prompt = prompts()
    given |= {"image": tiny.torch_image(IMAGES), "mask_image": tiny.torch_image(MASK)}
    given |= {"height": 16, "width": 16, "strength": strength or 1.0}
    drawn = [posterior_noise()] if channels == 4 or strength else []
    masked = np.asarray(image_noise(folded(folded(KEYS, tasks.MASKED), POSTERIOR), (8, 8, 4)))
    expected, sampler = run(
        theirs, ours, scheduler, given, [*drawn, NOISE, masked], strength=strength
    )
    options = {"strength": strength or 1.0}
    inputs = tasks.repainted(ours, params, KEYS, *prompt, IMAGES, MASK, **options)
    latents = draw(ours, params, sampler, KEYS, inputs, CFG)
    assert_same(ours, params, latents, expected)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "euler", "ancestral"])
def test_instruct(scheduler):
    theirs, ours, params = both("StableDiffusionInstructPix2PixPipeline", scheduler, 8)
    given, (cond, null) = prompts()
    given |= {"image": tiny.torch_image(IMAGES), "image_guidance_scale": 1.5}
    given["latents"] = tiny.torch_image(NOISE)
    expected, sampler = run(theirs, ours, scheduler, given)
    inputs = tasks.edited(ours, params, cond, null, IMAGES)
    latents = draw(ours, params, sampler, KEYS, inputs, (instruct(3.0, 1.5),))
    assert_same(ours, params, latents, expected)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "euler", "ancestral"])
def test_upscale(scheduler):
    low_res = diffusers.DDPMScheduler(beta_schedule="scaled_linear", beta_start=0.0001)
    theirs, ours, params = both(
        "StableDiffusionUpscalePipeline", scheduler, 7, "upscaler", low_res_scheduler=low_res,
        max_noise_level=350,
    )  # fmt: skip
    given, prompt = prompts()
    small = IMAGES[:, :8, :8]
    given |= {"image": tiny.torch_image(small), "noise_level": 70}
    given["latents"] = tiny.torch_image(NOISE)
    drawn = [image_noise(folded(KEYS, tasks.LOW_RES), (8, 8, 3))]
    expected, sampler = run(theirs, ours, scheduler, given, drawn)
    inputs = tasks.upscaled(ours, KEYS, *prompt, small, noise_level=70)
    latents = draw(ours, params, sampler, KEYS, inputs, CFG)
    assert_same(ours, params, latents, expected)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "pndm"])  # others: noise is not scaled there
def test_class_to_image(scheduler):
    theirs, ours, params = both("DiTPipeline", scheduler, kind="dit")
    given = {"class_labels": [3, 999], "guidance_scale": 3.0, "output_type": "np"}
    expected, sampler = run(theirs, ours, scheduler, given, [NOISE])
    inputs = tasks.new(ours, *ours.conditioner(params, [3, 999]))
    latents = draw(ours, params, sampler, KEYS, inputs, CFG)
    assert_same(ours, params, latents, expected)


def test_distilled_guidance():
    theirs, ours, params = both("LatentConsistencyModelPipeline", "lcm", kind="lcm")
    given, (cond, null) = prompts(guided=False)
    given |= {"height": 16, "width": 16, "latents": tiny.torch_image(NOISE), "guidance_scale": 1.5}
    noises = [image_noise(KEYS, (8, 8, 4), r + 1) for r in range(3)]
    expected, sampler = run(theirs, ours, "lcm", given, noises)
    latents = draw(ours, params, sampler, KEYS, tasks.new(ours, cond, null), (cfg(1.5),))
    assert_same(ours, params, latents, expected)


POOLED, NULL_POOLED = RNG.normal(size=(2, BATCH, 24)).astype(np.float32)


def sdxl_prompts(size, aesthetics=(None, None), **sizes):
    given, (cond, null) = prompts()
    given |= {
        "pooled_prompt_embeds": torch.tensor(POOLED),
        "negative_pooled_prompt_embeds": torch.tensor(NULL_POOLED),
    }
    cond = cond.replace(pooled=jnp.asarray(POOLED))
    null = null.replace(pooled=jnp.asarray(NULL_POOLED))
    pair = zip((cond, null), aesthetics)
    ours = [tasks.micro_conditioning(c, size, aesthetic=score, **sizes) for c, score in pair]
    return given, ours


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "euler", "ancestral"])
def test_sdxl(scheduler):
    theirs, ours, params = both("StableDiffusionXLPipeline", scheduler, kind="sdxl")
    given, prompt = sdxl_prompts((16, 16), original=(40, 24), crop=(2, 3))
    given |= {"height": 16, "width": 16, "latents": tiny.torch_image(NOISE)}
    given |= {"original_size": (40, 24), "crops_coords_top_left": (2, 3)}
    expected, sampler = run(theirs, ours, scheduler, given)
    latents = draw(ours, params, sampler, KEYS, tasks.new(ours, *prompt), CFG)
    assert_same(ours, params, latents, expected)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "euler", "ancestral"])
def test_sdxl_image_to_image(scheduler):
    theirs, ours, params = both("StableDiffusionXLImg2ImgPipeline", scheduler, kind="sdxl")
    given, prompt = sdxl_prompts((16, 16))
    given |= {"image": tiny.torch_image(IMAGES), "strength": 0.5}
    drawn = [posterior_noise(), NOISE]
    expected, sampler = run(theirs, ours, scheduler, given, drawn, strength=0.5)
    inputs = tasks.from_picture(ours, params, KEYS, *prompt, IMAGES)
    latents = draw(ours, params, sampler, KEYS, inputs, CFG)
    assert_same(ours, params, latents, expected)


@pytest.mark.parametrize("scheduler", ["ddim", "dpm", "euler", "ancestral", "heun"])
def test_sdxl_with_refiner(scheduler):
    base, our_base, base_params = both("StableDiffusionXLPipeline", scheduler, kind="sdxl")
    refiner, our_refiner, refiner_params = both(
        "StableDiffusionXLImg2ImgPipeline",
        scheduler,
        kind="refiner",
        requires_aesthetics_score=True,
    )
    steps, fraction, counts = 8, 0.5, (4, 4)
    if scheduler == "heun":  # of 7 evaluations: the base stops within a step
        steps, counts = 4, (3, 5)
    first, last = samplers.hand_over(our_base.scheduler, our_refiner.scheduler, steps, fraction)
    assert (first.solver.evaluations, last.solver.evaluations) == counts
    given, prompt = sdxl_prompts((16, 16))
    given |= {"height": 16, "width": 16, "latents": tiny.torch_image(NOISE)}
    given |= {"denoising_end": fraction, "num_inference_steps": steps, "output_type": "latent"}
    noises = [image_noise(KEYS, (8, 8, 4), r + 1) for r in range(4)]
    again = [image_noise(folded(KEYS, tasks.REFINER), (8, 8, 4), r + 1) for r in range(4)]
    stochastic = scheduler == "ancestral"
    with torch.no_grad(), tiny.noises(*(noises if stochastic else [])):
        between = base(**given).images
    given, refined_prompt = sdxl_prompts((16, 16), (6.0, 2.5))
    given |= {"denoising_start": fraction, "num_inference_steps": steps, "image": between}
    with torch.no_grad(), tiny.noises(*(again if stochastic else [])):
        expected = refiner(**given).images
    latents = draw(our_base, base_params, first, KEYS, tasks.new(our_base, *prompt), CFG)
    keys = folded(KEYS, tasks.REFINER)
    inputs = tasks.continued(*refined_prompt, latents)
    refined = draw(our_refiner, refiner_params, last, keys, inputs, CFG)
    assert_same(our_refiner, refiner_params, refined, expected)


def test_keys_and_arrays_must_fit():
    """At the public boundary, in words."""
    with pytest.raises(ValueError, match=r"keys: expected \[B\] typed keys.* got uint32"):
        check_batch(jax.random.PRNGKey(0), cond=None)
    with pytest.raises(ValueError, match=r"keys: expected \[B\] typed keys.* of shape \(\)"):
        check_batch(jax.random.key(0), cond=None)
    cond = Conditioning(context=jnp.ones((3, 5, 32)))
    with pytest.raises(ValueError, match=r"cond has an array of shape \(3, 5, 32\) for 2 keys"):
        check_batch(KEYS, cond=cond)
    ours = both("StableDiffusionPipeline", "ddim")[1]
    sampler = samplers.make(ours, steps=4)
    with pytest.raises(ValueError, match="cond has an array"):
        draw(ours, {}, sampler, KEYS, tasks.new(ours, cond))
    with pytest.raises(ValueError, match="images has an array"):
        tasks.from_picture(ours, {}, KEYS, cond, None, IMAGES[:1])
