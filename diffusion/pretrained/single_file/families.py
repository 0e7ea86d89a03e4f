"""The families of single-file checkpoints: how to recognise them, and their published settings.

The keys of ``FAMILIES`` are diffusers' names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn

from diffusion.models import unet as unets
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.clip import ClipText
from diffusion.pretrained import files
from diffusion.pretrained.single_file import keys

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER_OPEN_CLIP = "conditioner.embedders.0.model."
EMA = "model_ema."
NO_WEIGHTS = (
    r"model_ema\..*|betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights"
    r"|logvar|scale_factor|global_step|denoiser\.sigmas|first_stage_model\.loss\..*"
    r"|low_scale_model\..*|edm_mean|edm_std|v_pred|ztsnr|.*\.logit_scale|.*\.position_ids"
)
"""Keys that are not weights: training state, noise schedules, losses, indices, markers."""
UNUSED = (
    r"embedding_manager\..*|(cond_stage_model|conditioner\.embedders\.0)\.transformer\."
    r"text_projection(\.weight)?"
)
"""Weights that no pipeline uses: of training by textual inversion, and behind Stable Diffusion's
first text encoder."""
NORM = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
"""Of Stable Diffusion 2: its deviation is above 0.09 in networks that predict v (as ComfyUI tells
them apart)."""


_openai = partial(ClipText, width=768, depth=12, heads=12, hidden=3072)
_open_clip_h = partial(ClipText, width=1024, depth=23, heads=16, hidden=4096, activation="gelu")
_open_clip_g = partial(ClipText, width=1280, depth=32, heads=20, hidden=5120, activation="gelu")
TABLES = {
    CLIP: keys.clip,
    XL_CLIP: keys.clip,
    OPEN_CLIP: keys.open_clip,
    XL_OPEN_CLIP: keys.open_clip,
    REFINER_OPEN_CLIP: keys.open_clip,
    UNET: keys.unet,
    VAE: keys.autoencoder,
}
"""Prefix of a component's keys -> its name table."""
LATENT = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
DDIM = {
    **{"_class_name": "DDIMScheduler", **LATENT, "num_train_timesteps": 1000},
    **{"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1},
    "prediction_type": "epsilon",
}
PNDM = {**DDIM, "_class_name": "PNDMScheduler", "skip_prk_steps": True}
PNDM.pop("clip_sample")
LOW_RES = {
    **{"_class_name": "DDPMScheduler", "beta_schedule": "scaled_linear", "beta_start": 0.0001},
    **{"beta_end": 0.02, "num_train_timesteps": 1000, "prediction_type": "epsilon"},
    **{"clip_sample": True, "variance_type": "fixed_small"},
}
"""The scheduler that noises the small picture which the x4 upscaler enlarges."""
EULER = {
    **{"_class_name": "EulerDiscreteScheduler", **LATENT, "num_train_timesteps": 1000},
    **{"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "epsilon"},
}


PLAYGROUND = {
    **{"_class_name": "EDMDPMSolverMultistepScheduler", "num_train_timesteps": 1000},
    **{"sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0},
    **{"prediction_type": "epsilon", "final_sigmas_type": "zero"},
}
"""Playground 2.5, an SDXL network with EDM's preconditioning. Its files have the mean and the
deviation of its latents, edm_mean and edm_std, and the latents are multiplied by 0.5."""


@dataclass(frozen=True)
class Family:
    """Checkpoints of one kind.

    Attributes:
      pipeline: diffusers' class.
      parts: component -> (prefix of its keys, its published network).
      scheduler: the published scheduler_config.json; its prediction_type is what the network was
        trained to predict.
    """

    pipeline: str
    parts: Mapping[str, tuple[str, Callable[[], nn.Module]]]
    scheduler: Mapping[str, Any]


def _family(pipeline: str, net: Callable, vae: dict, encoders: dict, scheduler: dict) -> Family:
    vae = {"widths": (128, 256, 512, 512), "blocks": 2} | vae
    parts = {"unet": (UNET, net), "vae": (VAE, partial(AutoencoderKL, **vae))}
    return Family(pipeline, parts | encoders, scheduler)


def _unet(preset: Callable, channels: int, context: int, size: int, **fields: int) -> Callable:
    sizes = {"in_channels": channels, "context_width": context, "image_size": size}
    return partial(preset, **sizes, **fields)


ONE = {"text_encoder": (CLIP, _openai)}
TWO = {"text_encoder": (OPEN_CLIP, _open_clip_h)}
PROJECTED = partial(_open_clip_g, projection=1280)
XL = {"text_encoder": (XL_CLIP, _openai), "text_encoder_2": (XL_OPEN_CLIP, PROJECTED)}
REFINER = {"text_encoder_2": (REFINER_OPEN_CLIP, PROJECTED)}
V = {"prediction_type": "v_prediction"}
SD_VAE = {"scaling_factor": 0.18215, "sample_size": 512}
XL_VAE = {"scaling_factor": 0.13025, "sample_size": 1024}
SD, INPAINT = "StableDiffusionPipeline", "StableDiffusionInpaintPipeline"
PIX2PIX, UPSCALE = "StableDiffusionInstructPix2PixPipeline", "StableDiffusionUpscalePipeline"
SDXL, XL_INPAINT = "StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline"
XL_IMG2IMG = "StableDiffusionXLImg2ImgPipeline"
XL_NET = partial(_unet, unets.sdxl, added_width=2816)
REFINER_NET = _unet(unets.sdxl_refiner, 4, 1280, 128, added_width=2560)
UPSCALE_VAE = {"widths": (128, 256, 512), "scaling_factor": 0.08333, "sample_size": 256}
UPSCALE_DDIM = DDIM | V | {"beta_start": 0.0001, "beta_end": 0.02}
FAMILIES = {
    "v1": _family(SD, _unet(unets.sd15, 4, 768, 64), SD_VAE, ONE, PNDM),
    "inpainting": _family(INPAINT, _unet(unets.sd15, 9, 768, 64), SD_VAE, ONE, PNDM),
    "instruct-pix2pix": _family(PIX2PIX, _unet(unets.sd15, 8, 768, 64), SD_VAE, ONE, PNDM),
    "v2": _family(SD, _unet(unets.sd21, 4, 1024, 96), SD_VAE, TWO, DDIM | V),
    "inpainting_v2": _family(INPAINT, _unet(unets.sd21, 9, 1024, 64), SD_VAE, TWO, DDIM),
    "upscale": _family(
        UPSCALE, _unet(unets.x4_upscaler, 7, 1024, 128), UPSCALE_VAE, TWO, UPSCALE_DDIM
    ),
    "xl_base": _family(SDXL, XL_NET(4, 2048, 128), XL_VAE, XL, EULER),
    "xl_inpaint": _family(XL_INPAINT, XL_NET(9, 2048, 128), XL_VAE, XL, EULER),
    "xl_refiner": _family(XL_IMG2IMG, REFINER_NET, XL_VAE, REFINER, EULER),
}
"""Families by diffusers' names."""


BY_SHAPE = {
    **{(768, 4): "v1", (768, 9): "inpainting", (768, 8): "instruct-pix2pix"},
    **{(1024, 4): "v2", (1024, 9): "inpainting_v2", (1024, 7): "upscale"},
    **{(2048, 4): "xl_base", (2048, 9): "xl_inpaint", (1280, 4): "xl_refiner"},
}
"""(Width of the text encoders' context, channels that the U-Net takes) -> family."""


def family(tensors: files.Tensors) -> str:
    """The family of these tensors, a key of ``FAMILIES``.

    Raises:
      ValueError: none that is known.
    """
    first = tensors.get(f"{UNET}input_blocks.0.0.weight")
    context = next(
        (t.shape[-1] for key, t in tensors.items() if key.endswith("attn2.to_k.weight")), None
    )
    if first is None or context is None:
        if "down_blocks.0.resnets.0.norm1.weight" in tensors:
            hint = "it is in diffusers' naming: put it into a folder with its config.json"
        else:
            hint = f"it begins with {', '.join(sorted(tensors)[:3])}"
        raise ValueError(f"no checkpoint of Stable Diffusion 1, 2 or XL: {hint}")
    prefixes = {XL_OPEN_CLIP: 2048, REFINER_OPEN_CLIP: 1280, OPEN_CLIP: 1024, CLIP: 768}
    held = (w for prefix, w in prefixes.items() if any(key.startswith(prefix) for key in tensors))
    # In a file without text encoders, the width of cross-attention shows for which it was made.
    width, channels = next(held, context), first.shape[1]
    found = BY_SHAPE.get((width, channels))
    if found is None:
        raise ValueError(
            f"no known kind of checkpoint: its U-Net takes {channels} channels and a context of "
            f"width {context}; known: {', '.join(FAMILIES)}"
        )
    return found
