"""Fine-tuning: a pipeline's U-Net to begin with, and a pipeline that diffusers reads to end with.

``config.model.name="pretrained"`` trains the U-Net of the pipeline ``config.model.path``; its
autoencoder and text encoder stay as they are and are used through the cache (``latents``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import pretrained
from diffusion.errors import field
from diffusion.objectives.denoising import Denoising
from diffusion.pipelines.to_diffusers import PREDICTIONS
from diffusion.pretrained import hub
from diffusion.pretrained.schedulers import from_diffusers

NAME = "pretrained"
UNET, SCHEDULER = "unet", "scheduler"
CONFIG = "scheduler_config.json"
CLASS = "UNet2DConditionModel"


def is_pretrained(config: ConfigDict) -> bool:
    """Whether the config's network is a pretrained one."""
    return config.model.name == NAME


def check_path(config: ConfigDict) -> None:
    """Raises ValueError where ``config.model.path`` is empty or holds another kind of pipeline."""
    path = config.model.path
    if not path:
        raise ValueError("config.model.path must name a pipeline's folder, or its id on the hub")
    with field(f"config.model.path={path!r}"):
        pretrained.open_model(path, UNET, expected=CLASS, with_weights=False)


def initial(config: ConfigDict) -> Callable[[Any, Callable], Any] | None:
    """Gives the parameters that training begins with, in float32; None: random ones."""
    if not is_pretrained(config):
        return None
    path = config.model.path
    return lambda shapes, random: {"network": pretrained.load(path, UNET, dtype=jnp.float32).params}


def scheduler(config: ConfigDict) -> dict[str, Any]:
    """The pipeline's scheduler config, with what the objective changes.

    That is the prediction and, for ``zero_terminal_snr``, rescaled betas and trailing steps, in
    DDIM's class, since many have no such fields (Lin et al., 2024).

    Raises:
      ValueError: diffusers' pipelines cannot say what the objective's prediction means.
    """
    c = config.objective
    folder = hub.locate(config.model.path, SCHEDULER, weights=False)
    fields = json.loads((folder / CONFIG).read_text())
    if c.prediction not in PREDICTIONS:
        raise ValueError(
            f"config.objective.prediction={c.prediction!r}: a pipeline of diffusers "
            f"predicts one of {', '.join(PREDICTIONS)}"
        )
    fields["prediction_type"] = PREDICTIONS[c.prediction]
    if c.schedule.startswith("zero_terminal_snr"):
        fields.pop("skip_prk_steps", None)
        fields |= {"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}
        fields |= {"timestep_spacing": "trailing", "clip_sample": False}
    return fields


def check(config: ConfigDict, objective: Denoising) -> None:
    """Raises ValueError unless objective and pipeline have the same noise levels and c_noise."""
    sampler = from_diffusers(scheduler(config), steps=10)
    t = np.linspace(1e-3, 1.0, 101)
    ours, theirs = objective.schedule(t), sampler.schedule(t)
    if not np.allclose(ours.alpha, theirs.alpha, atol=1e-4):
        raise ValueError(
            f"config.objective.schedule={config.objective.schedule!r} is not the pipeline's "
            f"({config.model.path}/{SCHEDULER}/{CONFIG}); Stable Diffusion's is 'scaled_linear' or "
            "'zero_terminal_snr(scaled_linear)'"
        )
    if not np.allclose(objective.c_noise(ours), sampler.c_noise(theirs), atol=1e-2):
        raise ValueError(
            f"config.objective.c_noise={config.objective.c_noise!r} is not the pipeline's; "
            "choose 'auto'"
        )


def export(config: ConfigDict, params: Any, folder: Path) -> None:
    """Writes the pipeline with these parameters {"network": ...} of its U-Net into ``folder``.

    Everything but the U-Net's weights and the scheduler is copied as it is.
    """
    source = hub.locate(config.model.path)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(source, partial, ignore=shutil.ignore_patterns(UNET))
    model = pretrained.open_model(source, UNET, with_weights=False)
    pretrained.save(partial / UNET, model.module, params["network"], config=model.config)
    fields = scheduler(config)
    (partial / SCHEDULER / CONFIG).write_text(json.dumps(fields, indent=2) + "\n")
    index = pretrained.read_index(partial)
    components = dict(index.components)
    components[SCHEDULER] = ("diffusers", fields["_class_name"])
    pretrained.save_index(partial, pretrained.Index(index.kind, components, index.options))
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)
    print(f"{folder}: the fine-tuned pipeline, for diffusers and --mode=generate")
