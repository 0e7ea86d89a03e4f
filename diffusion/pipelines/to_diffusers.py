"""A run's pipeline in diffusers' terms, as far as diffusers has any for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from diffusion import schedules
from diffusion.models.dit import DiT
from diffusion.models.unet import UNet
from diffusion.pipelines.codec import KL
from diffusion.pipelines.pipeline import Pipeline
from diffusion.pretrained.schedulers import from_diffusers

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def published(pipeline: Pipeline) -> Pipeline:
    """The pipeline with diffusers' kind, scheduler and sizes.

    A U-Net of pixels becomes a DDIMPipeline, or with rectified flow a DDPMPipeline of
    FlowMatchEulerDiscreteScheduler; a DiT of latents a DiTPipeline. Class names, and whether there
    is a null class, go into ``model_index.json``, where diffusers ignores them.

    Raises:
      ValueError: for what diffusers has nothing for; the message names it.
    """
    net, latent = pipeline.network, isinstance(pipeline.codec, KL)
    if pipeline.conditioner.subject == "text":
        raise ValueError(
            "the run's captions go through a text encoder of its own, which no pipeline of "
            "diffusers has; runs with class labels or without conditions can be saved"
        )
    if not (isinstance(net, DiT) if latent else isinstance(net, UNet)):
        expected = "a dit on latents" if latent else "a unet on pixels"
        raise ValueError(f"diffusers has pipelines of {expected}, this is {type(net).__name__}")
    side = pipeline.shape[0] if len(set(pipeline.shape[:-1])) == 1 else pipeline.shape[:-1]
    network = net.clone(in_channels=pipeline.shape[-1], image_size=side)
    scheduler = _scheduler(pipeline)
    flow = scheduler["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    kind = "DiTPipeline" if latent else "DDPMPipeline" if flow else "DDIMPipeline"
    options: dict[str, Any] = {}
    if pipeline.conditioner.subject == "label":
        names = pipeline.conditioner.names
        options = {"null_class": True} | ({"class_names": list(names)} if names else {})
    return replace(pipeline, kind=kind, network=network, scheduler=scheduler, options=options)


def _scheduler(pipeline: Pipeline) -> dict[str, Any]:
    """The fields of a scheduler with the pipeline's schedule, prediction and c_noise."""
    schedule = pipeline.schedule
    name = getattr(pipeline.prediction, "__name__", "edm")
    if isinstance(schedule, schedules.Table) and name in PREDICTIONS:
        alphas = np.append(1.0, schedule.alphas)
        fields = {
            "_class_name": "DDIMScheduler",
            "num_train_timesteps": schedule.steps,
            "trained_betas": (1 - (alphas[1:] / alphas[:-1]) ** 2).tolist(),
            "prediction_type": PREDICTIONS[name],
            "clip_sample": False,
            "set_alpha_to_one": True,
            "timestep_spacing": "trailing",
        }
    elif isinstance(schedule, schedules.RectifiedFlow) and name == "flow":
        fields = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
        fields |= {"shift": 1.0}
    else:
        raise ValueError(
            f"diffusers has no scheduler for {type(schedule).__name__} with the prediction {name}; "
            "it has them for tables of betas (linear, cosine, ...) with eps, v or x0, and for "
            "rectified_flow with flow"
        )
    theirs = from_diffusers(fields, 10)
    t = np.linspace(1e-3, schedule.t_max, 101)
    seen, expected = (np.asarray(p.c_noise(schedule(t))) for p in (pipeline, theirs))
    if not np.allclose(seen, expected, atol=1e-2):
        raise ValueError("c_noise: diffusers gives this scheduler's networks other times")
    return fields
