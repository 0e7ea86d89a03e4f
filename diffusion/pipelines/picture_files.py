"""Pictures and masks from files, in the size that a pipeline wants."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.data import images
from diffusion.data.images import Picture

FITS = ("crop", "pad")


def read_image(
    path: Picture, size: tuple[int, int] | None = None, channels: int = 3, fit: str = "crop"
) -> np.ndarray:
    """A picture [H, W, channels] in [-1, 1], float32.

    Read as data are (``data.images``): upright, 8 or 16 bits, on white where it is transparent.

    Args:
      path: of a file of any format that Pillow reads, or Pillow's own picture.
      size: (height, width) to scale to, in proportion; None: as it is.
      channels: 3 for colours, 1 for grey.
      fit: what is done with other proportions: "crop" cuts the longer side, "pad" adds white.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no picture, or damaged.
    """
    pixels = _fitted(_read(path, channels, images.WHITE), size, fit, images.WHITE)
    return np.asarray(pixels, np.float32) / np.float32(127.5) - 1


def read_mask(path: Picture, size: tuple[int, int], fit: str = "crop") -> np.ndarray:
    """A mask [H, W, 1], 1 where the file is at least half white, else 0.

    Where it is transparent it counts as black, and so does what ``fit`` adds.

    Raises:
      FileNotFoundError, ValueError: as ``read_image``; or nothing is white.
    """
    mask = (_fitted(_read(path, 1, (0, 0, 0)), size, fit, (0, 0, 0)) >= 127.5).astype(np.float32)
    if not mask.any():
        raise ValueError("nothing in this mask is white: no part of the picture would be painted")
    return mask


def fitting_size(path: Picture, unit: int) -> tuple[int, int]:
    """(height, width) of a picture, rounded down to multiples of ``unit``, at least one."""
    height, width = _checked(path, images.size)
    return max(height // unit, 1) * unit, max(width // unit, 1) * unit


def _read(path: Picture, channels: int, background: tuple[int, int, int]) -> Image.Image:
    return _checked(path, images.decode, channels=channels, background=background)


def _fitted(
    image: Image.Image, size: tuple[int, int] | None, fit: str, colour: tuple[int, int, int]
) -> np.ndarray:
    """uint8 [H, W, C]."""
    if fit not in FITS:
        raise ValueError(f"fit={fit!r}: expected one of {FITS}")
    height, width = size or (image.height, image.width)
    if fit == "crop":
        return images.fit(image, height, width)
    scale = min(height / image.height, width / image.width)
    inner = max(round(scale * image.height), 1), max(round(scale * image.width), 1)
    small = images.fit(image, *inner)
    whole = np.full((height, width, small.shape[-1]), colour[0], np.uint8)
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    whole[top : top + inner[0], left : left + inner[1]] = small
    return whole


def _checked(path: Picture, read: Callable, **options: Any) -> Any:
    if isinstance(path, (str, Path)) and not Path(path).is_file():
        raise FileNotFoundError(f"no such picture: {path}")
    try:
        return read(path, **options)
    except images.UnreadableError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
