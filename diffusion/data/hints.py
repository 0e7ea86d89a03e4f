"""Pictures with what a ControlNet reads of them, its hint, as a further column."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial

import numpy as np

from diffusion.data.sources import Batch, Read, Source

Map = Callable[[np.ndarray], np.ndarray]
"""A picture [H, W, C] uint8 -> its condition map [H, W, 3] in [0, 1]."""


def with_maps(source: Source, pictures: Source, condition: Map) -> Source:
    """``source`` with ``hint`` [B, H, W, 3] in [0, 1], the condition maps of ``pictures``, which
    are its examples before an autoencoder has seen them."""
    return dataclasses.replace(
        source, read=partial(_mapped, source.read, pictures.read, condition), crop=None
    )


def with_images(source: Source, pictures: Source) -> Source:
    """``source`` with the pictures to edit of an edited pair as hints, and not to edit."""
    return dataclasses.replace(source, read=partial(_given, source.read, pictures.read), crop=None)


def _mapped(read: Read, pictures: Read, condition: Map, index: np.ndarray) -> Batch:
    x = np.round((pictures(index)["x"] + 1) * 127.5).astype(np.uint8)
    return read(index) | {"hint": np.stack([condition(one) for one in x]).astype(np.float32)}


def _given(read: Read, pictures: Read, index: np.ndarray) -> Batch:
    batch = read(index)
    batch.pop("image", None)
    return batch | {"hint": (pictures(index)["image"] + 1) / 2}
