"""Pipelines as single-file checkpoints in the original naming, in and out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffusion.pipelines.from_pretrained import ENCODERS, Opened, assemble
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pipelines.tokenizers import END
from diffusion.pretrained.single_file.checkpoint import open_single_file, write_single_file
from diffusion.pretrained.single_file.families import CLIP, FAMILIES, LOW_RES, XL_CLIP

OPTIONS = {
    "xl_base": {"force_zeros_for_empty_prompt": True},
    "xl_inpaint": {"force_zeros_for_empty_prompt": True},
    "xl_refiner": {"force_zeros_for_empty_prompt": False, "requires_aesthetics_score": True},
}
"""Other fields of the published pipelines' model_index.json."""


def open_checkpoint(
    path: str | Path,
    tokenizer: Callable[[str], Any],
    *,
    prediction_type: str | None = None,
    ema: bool = False,
    dtype: DTypeLike = jnp.float32,
    tile: int = 0,
    modules: Mapping[str, nn.Module] | None = None,
) -> Opened:
    """Finds out which pipeline a single-file checkpoint is, without reading its weights.

    Args:
      path: a .safetensors file of Stable Diffusion 1, 2, XL, or one of their relatives.
      tokenizer: makes CLIP's tokenizer, which is not in the file, with the given padding:
        ``lambda pad: clip_tokenizer("bpe_simple_vocab_16e6.txt.gz", pad=pad)``.
      prediction_type, ema, modules: see ``open_single_file``.
      dtype, tile: see ``pipelines.open_any``.

    Raises:
      ValueError: for another kind of file, or one in which a part is missing.
    """
    opened = open_single_file(path, modules=modules, prediction_type=prediction_type, ema=ema)
    kind = FAMILIES[opened.family]
    missing = [name for name in kind.parts if name not in opened.components]
    if missing:
        raise ValueError(f"{path}: a checkpoint of {opened.family} without {', '.join(missing)}")
    nets = {name: m.module.clone(dtype=dtype) for name, m in opened.components.items()}
    encoders = [name for name in ENCODERS if name in nets]
    # OpenAI's encoder was trained on texts filled up with the end token, OpenCLIP's on others.
    pads = [END if kind.parts[name][0] in (CLIP, XL_CLIP) else "!" for name in encoders]
    pipeline = assemble(
        kind.pipeline,
        nets["unet"],
        nets["vae"],
        opened.scheduler,
        [nets[name] for name in encoders],
        [tokenizer(pad) for pad in pads],
        tile=tile,
        low_res=LOW_RES if opened.family == "upscale" else None,
        options=OPTIONS.get(opened.family, {}),
    )
    return Opened(pipeline, dict(opened.components), dtype, Path(path).stem)


def save_checkpoint(
    path: str | Path,
    family: str,
    pipeline: Pipeline,
    params: Params,
    dtype: DTypeLike | None = None,
) -> None:
    """Writes a pipeline as one file in the original naming, of a family of ``FAMILIES``.

    ``dtype`` is of the weights, by default their own. Raises ValueError for networks that such
    files do not hold.
    """
    parts = {
        "unet": (pipeline.network, params["network"]),
        "vae": (pipeline.codec.network, params["autoencoder"]),
    }
    # A refiner's only encoder is the second one.
    held = FAMILIES[family].parts if family in FAMILIES else ENCODERS
    names = [name for name in ENCODERS if name in held]
    parts |= dict(zip(names, zip(pipeline.conditioner.encoders, params["encoders"])))
    write_single_file(path, family, parts, dtype=dtype)
