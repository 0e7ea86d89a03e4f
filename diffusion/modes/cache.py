"""--mode=cache: latents, text embeddings and pictures of a class, before training."""

from __future__ import annotations

from functools import partial

from ml_collections import ConfigDict

from diffusion.config import adaptation, class_pictures, latents, ranges
from diffusion.config.data import make_images


def run(config: ConfigDict, workdir: str) -> None:
    """Computes latents and text embeddings into ``config.data.cache``, as training does at first,
    and draws the pictures that ``config.data.subject.class_dir`` lacks.

    What was interrupted goes on; what is there already stays. Without ``config.data.cache`` latents
    for an adapter go into ``workdir``, where its training looks for them.
    """
    ranges.check(config)
    adaptation.resolve(config, workdir)
    drawn = class_pictures.draw_missing(config)
    if not latents.needed(config.data):
        if drawn is None:
            raise ValueError(
                "nothing to cache: config.data.autoencoder and config.data.text_encoder are empty"
            )
        return
    latents.compute(config.data, partial(make_images, config.data))
    print(f"cached in {config.data.cache}")
