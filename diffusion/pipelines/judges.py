"""Feature networks that were trained by this project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.evaluation.networks.network import Network, Run
from diffusion.pipelines import description
from diffusion.pipelines.from_run import open_run
from diffusion.runs import manifest
from diffusion.runs import workdir as workdirs


def classifier(workdir: str) -> Network:
    """A classifier of noised examples in its run's folder, for examples as they are.

    It is asked at the least noise that it was trained on. Its outputs are "features" [B, D], means
    over the places in the middle of the network, and "label" [B] int. Its name has the beginning of
    the checkpoint's checksum, such as "classifier_1f3a5c7e": figures by two classifiers differ.

    Raises:
      FileNotFoundError, ValueError: there is no such run, or it is one of another network.
    """
    run = open_run(workdir)
    d = run.description
    if d.network != "classifier":
        raise ValueError(
            f"{workdir} holds a run of a {d.network}; expected a classifier, such as "
            "configs/digits_classifier.py trains"
        )
    objective = description.classification(d)

    @jax.jit
    def see(params: Any, x: jax.Array) -> dict[str, jax.Array]:
        level = objective.schedule(jnp.full(len(x), objective.t_min))
        logits = objective.classifier(params)(x, level)
        return {"features": objective.features(params, x).mean((1, 2)), "label": logits.argmax(-1)}

    def open_weights() -> Run:
        params = run.load()

        def seen(x: np.ndarray, _: Sequence[Any]) -> dict[str, jax.Array]:
            if x.shape[1:] != d.shape:
                raise ValueError(f"{workdir} was trained on {d.shape}, got {x.shape[1:]}")
            return see(params, x)

        return seen

    step = workdirs.steps(workdir)[-1]
    files = (Path(workdir) / workdirs.CHECKPOINTS / str(step) / manifest.MANIFEST,)
    outputs = ("features", "label")
    made = Network("classifier", open_weights, outputs, files, pictures=False, batch=500)
    return replace(made, name=f"classifier_{made.checksum[:8]}")
