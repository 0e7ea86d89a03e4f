"""What a run that trained an adapter leaves for other software."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

from diffusion import pretrained
from diffusion.adapters.adapter import Adapter, Params
from diffusion.pipelines import adapted, adapters
from diffusion.pipelines.pipeline import Pipeline
from diffusion.pretrained.adapters import embeddings, ip_adapter

FILE, CONTROLNET, IP_ADAPTER = "adapter.safetensors", "controlnet", "ip_adapter.safetensors"


def save(
    folder: Path, base: Pipeline, shapes: Any, adapter: Adapter, params: Params
) -> Path | None:
    """Writes an adapter as others read it, or nothing where they have no such thing.

    Low-rank adapters and words become ``adapter.safetensors``, which config.adapters takes, too; a
    ControlNet becomes a folder as diffusers saves one, an IP-Adapter a file as published ones are.

    Args:
      folder: the run's.
      base: the model that the adapter is for; ``shapes`` are those of its parameters.
      adapter, params: what was trained.
    """
    params, file = jax.device_get(params), folder / FILE
    deltas = adapted.deltas(base, adapter, params)
    if deltas is not None:
        adapters.save(file, deltas, base, shapes)
        return file
    if hasattr(adapter, "word"):
        embeddings.write(file, [adapter.word(params)])
        return file
    if hasattr(adapter, "hint_widths") and base.scheduler is not None:
        net = adapter.network(base.network).nets[0]
        pretrained.save(folder / CONTROLNET, net, params)
        return folder / CONTROLNET
    if hasattr(adapter, "feature") and base.scheduler is not None:
        ip_adapter.save(folder / IP_ADAPTER, base.network, params)
        return folder / IP_ADAPTER
    return None
