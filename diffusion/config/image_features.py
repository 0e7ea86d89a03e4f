"""Features of pictures that an adapter is trained with, computed once: ``image_features``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion.config import data, latents
from diffusion.data import array_cache, sources
from diffusion.data.sources import Batch, Source
from diffusion.evaluation.figures import to_uint8
from diffusion.pipelines.image_encoders import Encode, open_encoder

COLUMN = "image_features"
BATCH = 64
INDIFFERENT = (*latents.INDIFFERENT, "autoencoder", "text_encoder", "tokenizer", "tokens")
"""Fields of config.data that change no picture."""


def added(config: ConfigDict, adapter: Any, split: str, source: Source) -> Source:
    """The data with features of each picture, before an autoencoder has seen it.

    They lie in ``config.data.cache`` where there is one, else in memory.

    Raises:
      FileNotFoundError, ValueError: the adapter's encoder is not there, or gives other features
        than the adapter takes.
    """
    c = config.data
    encoder = open_encoder(adapter.encoder, patches=len(adapter.feature) == 2)
    width, wanted = encoder.width, adapter.feature[-1]
    images = data.make_images(c, split)
    rows = partial(_rows, encoder.open(), images)
    width = rows(np.arange(1))[COLUMN].shape[-1] if width is None else width
    if width != wanted:
        raise ValueError(f"features={wanted}: encoder={adapter.encoder!r} gives {width} numbers")
    if c.cache:
        about = {k: v for k, v in c.to_dict().items() if k not in INDIFFERENT}
        folder, about = Path(c.cache) / f"{split}_features", about | {"encoder": adapter.encoder}
        columns: Batch = array_cache.compute(folder, len(images), rows, about, progress=False)
    else:
        count = len(images)
        parts = (np.arange(i, min(i + BATCH, count)) for i in range(0, count, BATCH))
        columns = {COLUMN: np.concatenate([rows(part)[COLUMN] for part in parts])}
    return sources.with_columns(source, columns)


def _rows(encode: Encode, images: Source, index: np.ndarray) -> Batch:
    return {COLUMN: np.asarray(encode(to_uint8(images.read(index)["x"]))[0])}
