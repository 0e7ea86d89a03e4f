"""Pictures and masks from files, in the size that a pipeline wants."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

White = (255, 255, 255)


Picture = str | Path | Image.Image


def read_image(path: Picture, size: tuple[int, int] | None = None, channels: int = 3) -> np.ndarray:
    """A picture [H, W, channels] in [-1, 1], float32.

    Turned as its EXIF data says; on white where it is transparent; scaled with Lanczos' filter.

    Args:
      path: of a file of any format that Pillow reads, or Pillow's own picture.
      size: (height, width) to scale to, without keeping proportions; None: as it is.
      channels: 3 for colours, 1 for grey.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: it is no picture, or damaged.
    """
    image = _open(path)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, (*White, 255)), image)
    image = image.convert("RGB" if channels == 3 else "L")
    if size is not None and image.size != (size[1], size[0]):
        image = image.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    pixels = np.asarray(image, np.float32) / np.float32(127.5) - 1
    return pixels if pixels.ndim == 3 else pixels[..., None]


def read_mask(path: Picture, size: tuple[int, int]) -> np.ndarray:
    """A mask [H, W, 1], 1 where the file is at least half white, else 0."""
    mask = _open(path).convert("L")
    if mask.size != (size[1], size[0]):
        mask = mask.resize((size[1], size[0]), Image.Resampling.LANCZOS)
    return (np.asarray(mask, np.float32)[..., None] >= 127.5).astype(np.float32)


def fitting_size(path: Picture, unit: int) -> tuple[int, int]:
    """(height, width) of a picture, rounded down to multiples of ``unit``, at least one."""
    width, height = _open(path).size
    return max(height // unit, 1) * unit, max(width // unit, 1) * unit


def _open(path: Picture) -> Image.Image:
    if isinstance(path, Image.Image):
        return ImageOps.exif_transpose(path)
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such picture: {path}")
    try:
        image = Image.open(path)
        image.load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path} is no picture, or damaged: {error}") from None
    return ImageOps.exif_transpose(image)
