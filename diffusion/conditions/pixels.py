"""Pictures of several kinds as arrays of one kind."""

from __future__ import annotations

import numpy as np

LUMA = np.array([0.299, 0.587, 0.114])
"""Shares of red, green and blue in grey (ITU-R BT.601)."""


def as_floats(picture: np.ndarray) -> np.ndarray:
    """[H, W, C] in [0, 1], float64, of uint8 or of floats in that range.

    Raises:
      ValueError: another shape or range, or values that are not finite.
    """
    x = np.asarray(picture)
    if x.ndim != 3 or x.shape[-1] not in (1, 3):
        raise ValueError(f"a picture has the shape [H, W, 3 or 1], got {list(x.shape)}")
    if x.dtype == np.uint8:
        return x / 255
    if not np.issubdtype(x.dtype, np.floating) or not (x.min() >= 0 and x.max() <= 1):
        raise ValueError(
            f"a picture has uint8 or floats in [0, 1], got {x.dtype} from {x.min()} to {x.max()}"
        )
    return x.astype(np.float64)


def grey(x: np.ndarray) -> np.ndarray:
    """[H, W] of [H, W, 3 or 1]."""
    return x[..., 0] if x.shape[-1] == 1 else x @ LUMA


def as_map(x: np.ndarray) -> np.ndarray:
    """[H, W, 3] in [0, 1], float32, of [H, W] or [H, W, 3 or 1]; values outside are clipped."""
    x = x[..., None] if x.ndim == 2 else x
    return np.clip(np.broadcast_to(x, (*x.shape[:2], 3)), 0, 1).astype(np.float32)
