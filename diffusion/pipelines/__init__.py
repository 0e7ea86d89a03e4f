"""Pipelines: whatever can be drawn from, a run that was trained here or a pretrained model.

from diffusion import pipelines

pipeline, params = pipelines.load("runs/digits")  # or a diffusers folder, a file, a hub id
pictures = pipelines.generate(pipeline, params, "7", steps=20, guidance=1.5, seed=0)
pictures[0].save("seven.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffusion.pipelines import adapters as adapting
from diffusion.pipelines import recognition
from diffusion.pipelines.from_pretrained import Opened, open_pipeline
from diffusion.pipelines.from_run import Run, is_run, open_run
from diffusion.pipelines.from_single_file import open_checkpoint
from diffusion.pipelines.generation import generate
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pipelines.to_diffusers import save_pretrained
from diffusion.pipelines.tokenizers import clip_tokenizer_at

__all__ = ["Pipeline", "generate", "load", "open_any", "save_pretrained"]


def open_any(
    path_or_id: str | Path,
    *,
    average: str = "ema",
    checkpoint: str = "newest",
    revision: str | None = None,
    variant: str | None = None,
    prediction_type: str | None = None,
    tokenizer: str = "",
    vae: str = "",
    network: str = "",
    family: str = "auto",
    dtype: DTypeLike | None = None,
    tile: int = 0,
    adapters: str | Sequence[str] = (),
) -> Opened | Run:
    """A model whose weights are not read yet; ``pipeline``, ``load()``.

    Args:
      path_or_id: a run's workdir, a folder as diffusers saves it, a .safetensors file in the
        original naming, or an id on the Hugging Face hub.
      average, checkpoint: of a run, which parameters; see ``runs.averages``.
      revision, variant: of a hub id, and of the weights' files.
      prediction_type: of a single file: epsilon or v_prediction; None: the published one.
      tokenizer: for a single file: CLIP's folder or merges file; empty: from the hub.
      vae: an autoencoder's folder or hub id, instead of a pretrained model's own.
      network: another network's folder, hub id or file of weights, instead of a pretrained
        model's own: ``Opened.with_network``.
      family: of a few-step checkpoint, "lightning(steps=4)"; "auto": what its files say; "": none.
        See ``few_step_families.CHOICES`` and ``recognition.chosen``.
      dtype: of a pretrained model; None: bfloat16, but float32 on a CPU.
      tile: pixels of the tiles in which pictures are decoded; 0: whole.
      adapters: of the model's weights, such as ("style.safetensors(0.8)", ...); see
        ``pipelines.adapters``.

    Raises:
      FileNotFoundError: there is no such model.
      ValueError: one that is not supported, or is damaged; an argument that is for another kind.
    """
    if not str(path_or_id):
        raise ValueError("expected a run's workdir, a diffusers folder, a file or a hub id")
    run, path = is_run(path_or_id), Path(path_or_id)
    pretrained, file = "a pretrained model", "a single file"
    usual = {"average": "ema", "checkpoint": "newest", "family": "auto"}
    for name, value, acts, kind in (
        ("average", average, run, "a run"),
        ("checkpoint", checkpoint, run, "a run"),
        ("revision", revision, not run and not path.exists(), "an id on the hub"),
        ("variant", variant, not run and not path.is_file(), "a folder or an id on the hub"),
        ("prediction_type", prediction_type, path.is_file(), file),
        ("tokenizer", tokenizer, path.is_file(), file),
        ("vae", vae, not run, pretrained),
        ("network", network, not run, pretrained),
        ("family", family, not run, pretrained),
        ("dtype", dtype, not run, pretrained),
        ("tile", tile, not run, pretrained),
    ):
        if value not in (usual.get(name), None, "", 0) and not acts:
            raise ValueError(f"{name}={value!r} has no effect: it is for {kind}")
    if run:
        opened = open_run(path_or_id, average=average, checkpoint=checkpoint)
        return adapting.attach(opened, adapters)
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if jnp.dtype(dtype) == jnp.float16 and jax.default_backend() == "cpu":
        raise ValueError("dtype=float16 needs a GPU or TPU; on a CPU use float32 or bfloat16")
    common = {"dtype": dtype, "tile": tile}
    if path.is_file():
        made = partial(clip_tokenizer_at, tokenizer)
        opened = open_checkpoint(path_or_id, made, prediction_type=prediction_type, **common)
    else:
        opened = open_pipeline(path_or_id, revision=revision, variant=variant, **common)
    opened = opened.with_network(network) if network else opened
    opened = opened.with_autoencoder(vae) if vae else opened
    names = [*adapting.paths(adapters), network, str(path_or_id)]
    return recognition.chosen(adapting.attach(opened, adapters), family, names)


def load(
    path_or_id: str | Path,
    *,
    network: str = "",
    family: str = "auto",
    dtype: DTypeLike | None = None,
    adapters: str | Sequence[str] = (),
) -> tuple[Pipeline, Params]:
    """A model and its parameters; arguments and errors of ``open_any``."""
    opened = open_any(path_or_id, network=network, family=family, dtype=dtype, adapters=adapters)
    return opened.pipeline, opened.load()
