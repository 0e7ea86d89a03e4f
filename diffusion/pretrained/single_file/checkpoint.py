"""Single-file checkpoints in the original naming: Stable Diffusion 1, 2, XL and their relatives.

Such a file holds the weights of U-Net, autoencoder and text encoders, without their settings. Its
keys and shapes determine its ``family``; the networks' other settings are those of the published
models of that family. Tokenizers and schedulers are not in the file.

    file = open_single_file("v1-5-pruned-emaonly.safetensors")
    params = file.components["unet"].load(dtype=jnp.bfloat16)
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
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
      prediction_type: the U-Net's output, 'epsilon' or 'v_prediction', which the weights do not
        show. The default is the published one of the family; of Stable Diffusion 2, a file with a
        ``global_step`` of 875000 is the one trained on epsilon (512 x 512).
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
                held = {key: _convolution(key, tensor) for key, tensor in held.items()}
            table, source = TABLES[prefix](module, prefix), f"{path} ({name})"
            components[name] = Model(module, to_config(module), table, held, source)
            components[name].check()
    if left:
        some = ", ".join(sorted(left)[:10])
        raise ValueError(f"{path}: {len(left)} tensors belong to no part of {found}: {some}")
    scheduler = _scheduler(kind, found, tensors, prediction_type)
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
    step = tensors.get("global_step")
    if prediction_type is None and found == "v2" and step is not None and step.read() == 875000:
        prediction_type = "epsilon"
    given = {"prediction_type": prediction_type} if prediction_type else {}
    return {**kind.scheduler, **given}
