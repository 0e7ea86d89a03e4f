"""Pipelines as folders that diffusers reads, runs as far as diffusers has terms for them.

save_pretrained("mine", pipeline, params)
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from diffusion import pretrained, schedules
from diffusion.models.dit import DiT
from diffusion.models.unet import UNet
from diffusion.pipelines.codec import KL
from diffusion.pipelines.from_pretrained import ENCODERS, SCHEDULERS
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pipelines.prompts import Prompts
from diffusion.pretrained import folders
from diffusion.pretrained.schedulers import from_diffusers

PREDICTIONS = {"eps": "epsilon", "v": "v_prediction", "x0": "sample"}


def save_pretrained(
    folder: str | Path, pipeline: Pipeline, params: Params, dtype: DTypeLike | None = None
) -> None:
    """Writes a folder that ``open_pipeline`` and diffusers' ``DiffusionPipeline`` read.

    A run becomes a DDIMPipeline, or with a transformer on latents a DiTPipeline, where diffusers
    has such networks and schedules.

    ``folder`` is new, or a pipeline's; ``dtype`` is of the weights, by default their own.

    Raises:
      ValueError: diffusers has nothing for a part of it, which the message names.
    """
    folder = Path(folder)
    if pipeline.scheduler is None:
        pipeline = published(pipeline)
    conditioner, codec = pipeline.conditioner, pipeline.codec
    if words := getattr(conditioner, "words", ()):
        raise ValueError(
            f"the prompts' new words, {', '.join(word for word, *_ in words)}, have no place in "
            "such a folder: save the model without them, which others load beside their files"
        )
    name = "transformer" if pipeline.kind == "DiTPipeline" else "unet"
    parts = {name: (pipeline.network, params["network"])}
    if isinstance(codec, KL):
        parts["vae"] = (codec.network, params["autoencoder"])
    components: dict[str, tuple[str, str] | None] = {}
    if isinstance(conditioner, Prompts):
        components |= {"safety_checker": None, "feature_extractor": None}  # absent, explicitly
        encoders = zip(ENCODERS, conditioner.encoders, params["encoders"], conditioner.tokenizers)
        for encoder, module, weights, tokenizer in encoders:
            parts[encoder] = (module, weights)
            where = encoder.replace("text_encoder", "tokenizer")
            tokenizer.save_pretrained(folder / where)
            components[where] = ("transformers", type(tokenizer).__name__)
    for part, (module, weights) in parts.items():
        pretrained.save(folder / part, module, weights, dtype=dtype)
        config = folders.read_json(folder / part / "config.json")
        library = "diffusers" if "_class_name" in config else "transformers"
        kind = config.get("_class_name") or config["architectures"][0]
        components[part] = (library, kind)
    for part in SCHEDULERS:
        config = pipeline.scheduler if part == "scheduler" else pipeline.low_res_scheduler
        if config is not None:
            (folder / part).mkdir(parents=True, exist_ok=True)
            folders.write_json(folder / part / "scheduler_config.json", config)
            components[part] = ("diffusers", config["_class_name"])
    index = pretrained.Index(pipeline.kind, components, pipeline.options)
    pretrained.save_index(folder, index)


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
