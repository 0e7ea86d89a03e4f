"""Condition maps that are given, brought to what networks were trained on.

Each function gives [H, W, 3], float32, in [0, 1] but for ``inpaint``.
"""

from __future__ import annotations

import numpy as np

from diffusion.conditions.ade20k import PALETTE
from diffusion.conditions.pixels import as_floats, as_map, grey

IGNORED = 255
"""A label that stands for no class, where labels have 8 bits."""


def depth(values: np.ndarray, invert: bool = False) -> np.ndarray:
    """Depth, near = white.

    8-bit maps are taken as they are; of others the least value becomes black and the largest white.

    Args:
      values: [H, W] or [H, W, 1 or 3], of any numbers; infinite ones are infinitely far.
      invert: the values grow with the distance.

    Raises:
      ValueError: a value is NaN, or none is finite.
    """
    values = values[..., None] if values.ndim == 2 else values
    if values.dtype == np.uint8:
        near = grey(as_floats(values))
        return as_map(1 - near if invert else near)
    x = grey(values.astype(np.float64))
    known = np.isfinite(x)
    if np.isnan(x).any() or not known.any():
        raise ValueError("a depth map must have finite values and no NaN")
    x = x / max(np.abs(x[known]).max(), np.finfo(np.float64).tiny)  # differences stay finite
    low, high = x[known].min(), x[known].max()
    near = (np.where(known, x, low) - low) / max(high - low, np.finfo(np.float64).tiny)
    return as_map(np.where(known, 1 - near if invert else near, 0))


def segmentation(labels: np.ndarray, first: int = 0) -> np.ndarray:
    """Classes in ADE20K's colours.

    Args:
      labels: whole numbers [H, W] or [H, W, 1], the classes; or uint8 [H, W, 3], the colours.
      first: label of the first class, a wall; lower ones, and 255, are no class and black.

    Raises:
      ValueError: a label is beyond the last class, or ``first`` is given with colours.
    """
    labels = labels[..., 0] if labels.shape[2:] == (1,) else labels
    if labels.ndim == 3:
        if first:
            raise ValueError(f"first={first} has no effect: the map is in colours")
        return as_map(as_floats(labels))
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"classes are whole numbers, got {labels.dtype}")
    index = labels.astype(np.int64) - first
    none = (index < 0) | (labels == IGNORED)
    if index[~none].max(initial=0) >= len(PALETTE):
        raise ValueError(
            f"class {index[~none].max()} is not one of ADE20K's, 0 to {len(PALETTE) - 1}; give a "
            "map in their colours, or classes of ADE20K (first=1 where its files begin with 1)"
        )
    colours = PALETTE[np.where(none, 0, index)] / 255
    return as_map(np.where(none[..., None], 0, colours))


def inpaint(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The picture [H, W, 3 or 1], and -1 where mask [H, W, 1] is at least 0.5: to be painted."""
    return np.where(mask >= 0.5, np.float32(-1), as_map(as_floats(picture)))
