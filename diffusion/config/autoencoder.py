"""From ``config.autoencoding`` to the objective of an autoencoder."""

from __future__ import annotations

from typing import Any

from ml_collections import ConfigDict

from diffusion import specs
from diffusion.config import optimizer
from diffusion.errors import field
from diffusion.models import discriminator
from diffusion.models.discriminator import PatchDiscriminator
from diffusion.models.lpips import LPIPS
from diffusion.objectives import distances
from diffusion.objectives.kl_autoencoder import Adversary, Autoencoding
from diffusion.pipelines.pipeline import Pipeline
from diffusion.pretrained.networks import lpips

DISTANCES = {name: distances.CHOICES[name] for name in ("l1", "l2")}


def make(config: ConfigDict, pipeline: Pipeline) -> tuple[Autoencoding, dict[str, Any]]:
    """The objective of config.autoencoding, and the frozen parameters that it needs.

    Raises:
      ValueError: a field does not fit; the message names it.
    """
    c, at, shape = config.autoencoding, "config.autoencoding", pipeline.shape
    network, adversary, frozen = pipeline.network, None, {}
    if c.perceptual and shape[-1] != 3:
        raise ValueError(f"{at}.perceptual compares RGB images, these have shape {shape}")
    if c.perceptual:
        with field(f"{at}.perceptual"):
            frozen = {"perceptual": lpips.load(c.perceptual)}
    if c.adversary:
        if c.adversary not in discriminator.CHOICES:
            raise specs.unknown(f"{at}.adversary", c.adversary, discriminator.CHOICES)
        start = c.adversary_start
        if start >= config.train.steps:
            raise ValueError(
                f"{at}.adversary_start={start} is not before the last of "
                f"config.train.steps={config.train.steps}"
            )
        with field(f"{at}.discriminator"):
            judge = PatchDiscriminator(**c.discriminator, dtype=network.dtype)
            judge.check(shape[0])
        tx = optimizer.make(config, config.train.steps - start).tx
        loss = discriminator.CHOICES[c.adversary]
        adversary = Adversary(judge, tx, loss, c.adversary_weight, start)
    objective = Autoencoding(
        network=network,
        distance=specs.function(c.distance, DISTANCES, f"{at}.distance"),
        kl_weight=c.kl_weight,
        perceptual=LPIPS(dtype=network.dtype) if c.perceptual else None,
        perceptual_weight=c.perceptual_weight,
        adversary=adversary,
        learned_variance=c.learned_variance,
    )
    return objective, frozen
