"""Single-file checkpoints in the original naming: Stable Diffusion 1, 2, XL and their relatives.

Such a file holds the weights of U-Net, autoencoder and text encoders, without their settings. Its
keys and shapes determine its ``family``; the networks' other settings are those of the published
models of that family. Tokenizers and schedulers are not in the file.

    file = open_single_file("v1-5-pruned-emaonly.safetensors")
    params = file.components["unet"].load(dtype=jnp.bfloat16)
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jax.typing import DTypeLike

from diffusion.pretrained import files, folders, names, weights
from diffusion.pretrained.models import Model, shapes, to_config
from diffusion.pretrained.single_file import families
from diffusion.pretrained.single_file.families import FAMILIES, TABLES, Family


@dataclass(frozen=True)
class SingleFile:
    """The contents of a single-file checkpoint, whose weights are not read yet.

    Attributes:
      family: a key of ``FAMILIES``.
      pipeline: diffusers' class for it.
      components: 'unet' and, if the file has them, 'vae', 'text_encoder' and 'text_encoder_2'.
      scheduler: the fields of the scheduler_config.json that is published for it.
    """

    family: str
    pipeline: str
    components: Mapping[str, Model]
    scheduler: Mapping[str, Any]


def open_single_file(
    path: str | Path,
    *,
    modules: Mapping[str, nn.Module] | None = None,
    prediction_type: str | None = None,
    ema: bool = False,
) -> SingleFile:
    """Determines the family of a single-file checkpoint and checks it, without reading weights.

    Args:
      path: a .safetensors file.
      modules: networks to use instead of the published ones, by component.
      prediction_type: the U-Net's output, 'epsilon' or 'v_prediction'. By default what the file's
        markers say (v_pred, and ztsnr for zero terminal SNR), of Stable Diffusion 2 what its
        weights show (``families.NORM``; a ``global_step`` of 875000 is the one trained on epsilon),
        else the published one of the family.
      ema: use the moving averages of the U-Net's weights, which some files also hold.

    Raises:
      ValueError: another kind of file; weights that are missing, misshapen or of no component.
    """
    tensors = files.open_file(path)
    try:
        found = families.family(tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    kind = FAMILIES[found]
    left = {
        key: tensor for key, tensor in tensors.items() if not re.fullmatch(families.NO_WEIGHTS, key)
    }
    unused = sorted(key for key in left if re.fullmatch(families.UNUSED, key))
    if unused:
        some = ", ".join(unused[:3]) + (", ..." if len(unused) > 3 else "")
        warnings.warn(f"{path}: {len(unused)} tensors are not used: {some}", stacklevel=2)
        left = {key: tensor for key, tensor in left.items() if key not in unused}
    components = {}
    for name, (prefix, build) in kind.parts.items():
        held = {key: left.pop(key) for key in list(left) if key.startswith(prefix)}
        if name == "vae" and not held:
            # Some files use another prefix.
            held = {families.VAE + k[4:]: left.pop(k) for k in list(left) if k.startswith("vae.")}
        if name == "unet" and ema:
            held = _averages(held, tensors, path)
        if held:
            module = (modules or {}).get(name) or build()
            if name == "vae":
                module = _with_statistics(module, tensors, path)
                held = {key: _convolution(key, tensor) for key, tensor in held.items()}
            table, source = TABLES[prefix](module, prefix), f"{path} ({name})"
            components[name] = Model(module, to_config(module), table, held, source)
            components[name].check()
    if left:
        some = ", ".join(sorted(left)[:10])
        raise ValueError(f"{path}: {len(left)} tensors belong to no part of {found}: {some}")
    try:
        scheduler = _scheduler(kind, found, tensors, prediction_type)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return SingleFile(found, kind.pipeline, components, scheduler)


def write_single_file(
    path: str | Path,
    kind: str,
    components: Mapping[str, tuple[nn.Module, Mapping[str, Any]]],
    *,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a checkpoint in the original naming, one tensor in memory at a time.

    The last layer and the projection of Stable Diffusion 2's text encoder are not used and not
    written.

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
        given = {key: tensor.shape for key, tensor in own.items()}
        names.check(names.bind(table, shapes(module)), given, f"params[{name}]")
        tensors |= own
    files.write_file(path, tensors)


def _averages(held: files.Tensors, tensors: files.Tensors, path: str | Path) -> files.Tensors:
    """The moving averages; their keys are those of the weights without dots."""
    named = {key: families.EMA + key.removeprefix("model.").replace(".", "") for key in held}
    missing = [name for name in named.values() if name not in tensors]
    if missing:
        raise ValueError(
            f"{path}: ema=True, but {len(missing)} of {len(named)} moving averages are missing,"
            f" such as {missing[0]}"
        )
    return {key: tensors[name] for key, name in named.items()}


def _convolution(key: str, tensor: files.Tensor) -> files.Tensor:
    """A weight of the autoencoder's attention as a 1 x 1 convolution; some files have a matrix."""
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
    marked, playground = "v_pred" in tensors, "edm_mean" in tensors
    if (marked and prediction_type == "epsilon") or (playground and prediction_type):
        marker = "v_pred" if marked else "edm_mean"
        raise ValueError(
            f"prediction_type={prediction_type!r}: the file's marker {marker} says otherwise"
        )
    if playground:
        return dict(families.PLAYGROUND)
    if prediction_type is None:
        prediction_type = "v_prediction" if marked else _shown(found, tensors)
    given = {"prediction_type": prediction_type} if prediction_type else {}
    if "ztsnr" in tensors:
        given |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    return {**kind.scheduler, **given}


def _shown(found: str, tensors: files.Tensors) -> str | None:
    """What the weights of Stable Diffusion 2 predict; None for other families."""
    if found != "v2":
        return None
    step, norm = tensors.get("global_step"), tensors.get(families.NORM)
    if step is not None and step.read() == 875000:
        return "epsilon"
    shown = norm is None or np.std(norm.read().astype(np.float32)) > 0.09
    return "v_prediction" if shown else "epsilon"


def _with_statistics(module: nn.Module, tensors: files.Tensors, path: str | Path) -> nn.Module:
    """The autoencoder with the statistics of latents that the file holds (Playground 2.5)."""
    held = [name for name in ("edm_mean", "edm_std") if name in tensors]
    if not held:
        return module
    values = [tuple(np.asarray(tensors[name].read(), np.float64).reshape(-1)) for name in held]
    if len(held) < 2 or any(len(v) != module.latent_channels for v in values):
        raise ValueError(
            f"{path}: edm_mean and edm_std must both have {module.latent_channels} numbers, found "
            f"{dict(zip(held, map(len, values)))}"
        )
    mean, std = (tuple(map(float, v)) for v in values)
    return module.clone(latents_mean=mean, latents_std=std, scaling_factor=0.5)
