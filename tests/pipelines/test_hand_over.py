"""Parts of a schedule, for base model and refiner and for image to image, as in diffusers."""

from functools import partial
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest

from diffusion.pipelines import samplers
from diffusion.pretrained.schedulers import from_diffusers

HANDED = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": partial(diffusers.PNDMScheduler, skip_prk_steps=True),
    "euler": diffusers.EulerDiscreteScheduler,
    "ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "heun karras": partial(diffusers.HeunDiscreteScheduler, use_karras_sigmas=True),
    "kdpm2": diffusers.KDPM2DiscreteScheduler,
    "kdpm2 ancestral": diffusers.KDPM2AncestralDiscreteScheduler,
    "dpm": partial(diffusers.DPMSolverMultistepScheduler, timestep_spacing="trailing"),
    "singlestep": diffusers.DPMSolverSinglestepScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
    "deis": diffusers.DEISMultistepScheduler,
    "sa": diffusers.SASolverScheduler,
    "lcm": diffusers.LCMScheduler,
}


@pytest.mark.parametrize("name", HANDED)
def test_parts_of_a_schedule_are_diffusers(name):
    """denoising_end, denoising_start and strength count evaluations and steps as diffusers does."""
    betas = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    made = HANDED[name](**betas)
    config = {**made.config, "_class_name": type(made).__name__}

    def theirs(steps, strength, start=None):
        made.set_timesteps(steps)
        pipeline = SimpleNamespace(scheduler=made)
        pipeline_class = diffusers.StableDiffusionXLImg2ImgPipeline
        return pipeline_class.get_timesteps(pipeline, steps, strength, "cpu", start)[0]

    for steps in (7, 10):
        for fraction in (0.3, 0.5, 0.75, 0.8):
            first, last = samplers.hand_over(config, config, steps, fraction)
            expected = theirs(steps, None, fraction).numpy()
            np.testing.assert_allclose(last.timesteps, expected, rtol=1e-4, atol=1e-3)
            every = made.timesteps.numpy()
            cutoff = round(1000 - fraction * 1000)
            expected = every[: np.sum(every >= cutoff)]
            np.testing.assert_allclose(first.timesteps[: len(expected)], expected, 1e-4, 1e-3)
            assert first.solver.evaluations == len(expected)
            if name != "lcm":  # whose scheduler shortens the list itself
                ours = from_diffusers(config, steps, strength=fraction).timesteps
                np.testing.assert_allclose(ours, theirs(steps, fraction).numpy(), 1e-4, 1e-3)


def test_hand_over_names_itself():
    config = {**diffusers.LMSDiscreteScheduler().config, "_class_name": "LMSDiscreteScheduler"}
    with pytest.raises(ValueError, match=r"hand_over=0.5: begin: LMSDiscreteScheduler"):
        samplers.hand_over(config, config, 10, 0.5)
    config = {**diffusers.DDIMScheduler().config, "_class_name": "DDIMScheduler"}
    with pytest.raises(ValueError, match=r"hand_over=0.01 of 10 steps leaves one"):
        samplers.hand_over(config, config, 10, 0.01)
