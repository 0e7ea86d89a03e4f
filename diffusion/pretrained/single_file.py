"""Single-file checkpoints in the original naming: Stable Diffusion 1, 2, XL and their relatives.

Such a file holds U-Net, autoencoder and text encoders side by side and says nothing about them:
what it is shows in its keys and shapes (``family``), the networks' other settings are those of the
published models of that family. Tokenizers and schedulers are not in it.

    file = open_single_file("v1-5-pruned-emaonly.safetensors")
    params = file.components["unet"].load(dtype=jnp.bfloat16)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
from jax.typing import DTypeLike

from diffusion.models import unet as unets
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.models.clip import ClipText
from diffusion.pretrained import files, folders, ldm_names, names, weights
from diffusion.pretrained.models import Model, shapes, to_config

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
REFINER_OPEN_CLIP = "conditioner.embedders.0.model."
EMA = "model_ema."
NO_WEIGHTS = (
    r"model_ema\..*|betas|alphas_cumprod.*|sqrt_.*|log_one_minus_.*|posterior_.*|lvlb_weights"
    r"|logvar|scale_factor|global_step|denoiser\.sigmas|first_stage_model\.loss\..*"
    r"|low_scale_model\..*|edm_mean|edm_std|.*\.logit_scale|.*\.position_ids"
)
"""What files hold beside weights: training state, noise schedules, losses, indices."""


def _openai() -> ClipText:
    return ClipText(width=768, depth=12, heads=12, hidden=3072)


def _open_clip_h() -> ClipText:
    return ClipText(width=1024, depth=23, heads=16, hidden=4096, activation="gelu")


def _open_clip_g() -> ClipText:
    return ClipText(width=1280, depth=32, heads=20, hidden=5120, activation="gelu", projection=1280)


def _vae(**fields: Any) -> AutoencoderKL:
    return AutoencoderKL(**({"widths": (128, 256, 512, 512), "blocks": 2} | fields))


def _unet(preset: Callable, channels: int, context: int, size: int, **fields: Any) -> nn.Module:
    return preset(in_channels=channels, context_width=context, image_size=size, **fields)


TABLES = {
    CLIP: ldm_names.clip,
    XL_CLIP: ldm_names.clip,
    OPEN_CLIP: ldm_names.open_clip,
    XL_OPEN_CLIP: ldm_names.open_clip,
    REFINER_OPEN_CLIP: ldm_names.open_clip,
    UNET: ldm_names.unet,
    VAE: ldm_names.autoencoder,
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
EULER = {
    **{"_class_name": "EulerDiscreteScheduler", **LATENT, "num_train_timesteps": 1000},
    **{"timestep_spacing": "leading", "steps_offset": 1, "prediction_type": "epsilon"},
}


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


def _family(
    pipeline: str, net: tuple, vae: dict[str, Any], encoders: dict, scheduler: dict, **fields: Any
) -> Family:
    preset, channels, context, size = net
    parts = {
        "unet": (UNET, lambda: _unet(preset, channels, context, size, **fields)),
        "vae": (VAE, lambda: _vae(**vae)),
    }
    return Family(pipeline, parts | encoders, scheduler)


ONE = {"text_encoder": (CLIP, _openai)}
TWO = {"text_encoder": (OPEN_CLIP, _open_clip_h)}
XL = {"text_encoder": (XL_CLIP, _openai), "text_encoder_2": (XL_OPEN_CLIP, _open_clip_g)}
REFINER = {"text_encoder_2": (REFINER_OPEN_CLIP, _open_clip_g)}
V = {"prediction_type": "v_prediction"}
SD_VAE = {"scaling_factor": 0.18215, "sample_size": 512}
XL_VAE = {"scaling_factor": 0.13025, "sample_size": 1024}
FAMILIES = {
    "v1": _family("StableDiffusionPipeline", (unets.sd15, 4, 768, 64), SD_VAE, ONE, PNDM),
    "inpainting": _family(
        "StableDiffusionInpaintPipeline", (unets.sd15, 9, 768, 64), SD_VAE, ONE, PNDM
    ),
    "instruct-pix2pix": _family(
        "StableDiffusionInstructPix2PixPipeline", (unets.sd15, 8, 768, 64), SD_VAE, ONE, PNDM
    ),
    "v2": _family("StableDiffusionPipeline", (unets.sd21, 4, 1024, 96), SD_VAE, TWO, DDIM | V),
    "inpainting_v2": _family(
        "StableDiffusionInpaintPipeline", (unets.sd21, 9, 1024, 64), SD_VAE, TWO, DDIM
    ),
    "upscale": _family(
        "StableDiffusionUpscalePipeline",
        (unets.x4_upscaler, 7, 1024, 128),
        {"widths": (128, 256, 512), "scaling_factor": 0.08333, "sample_size": 256},
        TWO,
        DDIM | V | {"beta_start": 0.0001, "beta_end": 0.02},
    ),
    "xl_base": _family(
        "StableDiffusionXLPipeline", (unets.sdxl, 4, 2048, 128), XL_VAE, XL, EULER, added_width=2816
    ),
    "xl_inpaint": _family(
        "StableDiffusionXLInpaintPipeline",
        (unets.sdxl, 9, 2048, 128),
        XL_VAE,
        XL,
        EULER,
        added_width=2816,
    ),
    "xl_refiner": _family(
        "StableDiffusionXLImg2ImgPipeline",
        (unets.sdxl_refiner, 4, 1280, 128),
        XL_VAE,
        REFINER,
        EULER,
        added_width=2560,
    ),
}
"""By diffusers' names of them."""


@dataclass(frozen=True)
class SingleFile:
    """What a single-file checkpoint holds; no weights have been read.

    Attributes:
      family: a key of ``FAMILIES``.
      pipeline: diffusers' class for it.
      components: 'unet' and, as far as they are in the file, 'vae', 'text_encoder' and
        'text_encoder_2'.
      scheduler: the fields of the scheduler_config.json that is published for it.
    """

    family: str
    pipeline: str
    components: Mapping[str, Model]
    scheduler: Mapping[str, Any]


def family(tensors: files.Tensors) -> str:
    """Which kind of checkpoint these tensors are, a key of ``FAMILIES``.

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
    prefixes = (XL_OPEN_CLIP, REFINER_OPEN_CLIP, OPEN_CLIP, CLIP)
    kinds = ("xl", "refiner", "two", "one")
    by_context = {2048: "xl", 1280: "refiner", 1024: "two", 768: "one"}
    held = (
        kind for prefix, kind in zip(prefixes, kinds) if any(k.startswith(prefix) for k in tensors)
    )
    # A file without text encoders still shows for which its cross-attention was made.
    kind = next(held, by_context.get(context))
    channels = first.shape[1]
    found = {
        ("one", 4): "v1",
        ("one", 9): "inpainting",
        ("one", 8): "instruct-pix2pix",
        ("two", 4): "v2",
        ("two", 9): "inpainting_v2",
        ("two", 7): "upscale",
        ("xl", 4): "xl_base",
        ("xl", 9): "xl_inpaint",
        ("refiner", 4): "xl_refiner",
    }.get((kind, channels))
    if found is None:
        raise ValueError(
            f"no known kind of checkpoint: its U-Net takes {channels} channels and a context of "
            f"width {context}; known: {', '.join(FAMILIES)}"
        )
    return found


def open_single_file(
    path: str | Path,
    *,
    modules: Mapping[str, nn.Module] | None = None,
    prediction_type: str | None = None,
    ema: bool = False,
) -> SingleFile:
    """Finds out what a single-file checkpoint is and checks it, without reading its weights.

    Args:
      path: a .safetensors file.
      modules: networks to take instead of the published ones, by component.
      prediction_type: 'epsilon' or 'v_prediction', what the U-Net predicts. The weights do not
        show it. By default what is published for the family, except that of Stable Diffusion 2
        files with a ``global_step`` of 875000 are the one trained on epsilon (512 x 512).
      ema: take the moving averages of the U-Net's weights, which some files hold beside them.

    Raises:
      ValueError: another kind of file; weights that are missing, misshapen or of no component.
    """
    tensors = files.open_file(path)
    try:
        found = family(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    kind = FAMILIES[found]
    left = {key: tensor for key, tensor in tensors.items() if not re.fullmatch(NO_WEIGHTS, key)}
    components = {}
    for name, (prefix, build) in kind.parts.items():
        held = {key: left.pop(key) for key in list(left) if key.startswith(prefix)}
        if name == "vae" and not held:
            # Some files call it by another name.
            held = {VAE + k[4:]: left.pop(k) for k in list(left) if k.startswith("vae.")}
        if name == "unet" and ema:
            held = _averages(held, tensors, path)
        if held:
            module = (modules or {}).get(name) or build()
            if name == "vae":
                held = {key: _convolution(key, tensor) for key, tensor in held.items()}
            model = Model(
                module, to_config(module), TABLES[prefix](module, prefix), held, f"{path} ({name})"
            )
            model.check()
            components[name] = model
    if left:
        some = ", ".join(sorted(left)[:10])
        raise ValueError(f"{path}: {len(left)} tensors belong to no part of {found}: {some}")
    return SingleFile(
        found, kind.pipeline, components, _scheduler(kind, found, tensors, prediction_type)
    )


def write_single_file(
    path: str | Path,
    kind: str,
    components: Mapping[str, tuple[nn.Module, Mapping[str, Any]]],
    *,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a checkpoint in the original naming, one tensor in memory at a time.

    Of Stable Diffusion 2's text encoder the last layer and the projection, which are not used, are
    not written.

    Args:
      path: the file.
      kind: a key of ``FAMILIES``.
      components: component -> (module, params).
      dtype: of the tensors; by default the parameters' own.

    Raises:
      ValueError: an unknown family, components that it does not have, or parameters that are not
        their module's.
    """
    if kind not in FAMILIES:
        near = folders.nearest(kind, FAMILIES)
        raise ValueError(f"kind={kind!r}: expected one of {', '.join(FAMILIES)}{near}")
    parts = FAMILIES[kind].parts
    tensors: dict[str, files.Tensor] = {}
    for name, (module, params) in components.items():
        if name not in parts:
            raise ValueError(f"{name}: checkpoints of {kind} hold {', '.join(parts)}")
        prefix, _ = parts[name]
        table = TABLES[prefix](module, prefix)
        own = weights.save_params(table, params, dtype=dtype)
        names.check(
            names.bind(table, shapes(module)),
            {k: t.shape for k, t in own.items()},
            f"params[{name}]",
        )
        tensors |= own
    files.write_file(path, tensors)


def _averages(held: files.Tensors, tensors: files.Tensors, path: str | Path) -> files.Tensors:
    """Moving averages lie under their weight's key without dots."""
    named = {key: EMA + key.removeprefix("model.").replace(".", "") for key in held}
    missing = [name for name in named.values() if name not in tensors]
    if missing:
        raise ValueError(
            f"{path}: ema=True, but {len(missing)} of {len(named)} moving averages are missing,"
            f" such as {missing[0]}"
        )
    return {key: tensors[name] for key, name in named.items()}


def _convolution(key: str, tensor: files.Tensor) -> files.Tensor:
    """Attention of the autoencoder as 1 x 1 convolutions, which some files keep as matrices."""
    if not re.search(r"\.attn_1\.(q|k|v|proj_out)\.weight$", key) or len(tensor.shape) == 4:
        return tensor
    shape = (*tensor.shape[:2], 1, 1)
    return replace(tensor, shape=shape, read=lambda: tensor.read().reshape(shape))


def _scheduler(
    kind: Family, found: str, tensors: files.Tensors, prediction_type: str | None
) -> dict[str, Any]:
    if prediction_type not in (None, "epsilon", "v_prediction"):
        raise ValueError(
            f"prediction_type={prediction_type!r}: expected 'epsilon' or 'v_prediction'"
        )
    step = tensors.get("global_step")
    if prediction_type is None and found == "v2" and step is not None and step.read() == 875000:
        prediction_type = "epsilon"
    scheduler = dict(kind.scheduler)
    return scheduler | ({"prediction_type": prediction_type} if prediction_type else {})
