"""Lines of a picture, white on black: condition maps that are computed without weights.

Each function takes a picture [H, W, 3 or 1], uint8 or of floats in [0, 1], and gives [H, W, 3] in
[0, 1], float32.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from diffusion.conditions.pixels import as_floats, as_map, grey
from diffusion.errors import check_range

SQUARE = np.ones((3, 3))
TANGENT = 13573, 13573 + 2**16  # of 22.5 and 67.5 degrees, times 2^15, as OpenCV rounds them


def canny(picture: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Edges one pixel wide (Canny, 1986), those of OpenCV's ``Canny`` to the pixel.

    The gradient is Sobel's of 8-bit values, not smoothed, |dx| + |dy|, of the channel where it is
    largest. A pixel is an edge where the gradient is a maximum across the edge and above ``low``,
    and the edge that it belongs to is somewhere above ``high``.

    Args:
      picture: [H, W, 3 or 1].
      low, high: thresholds, 0 to 2040.

    Raises:
      ValueError: they are not in that range, or low is above high.
    """
    check_range("low", low, 0, 2040)
    check_range("high", high, 0, 2040)
    if low > high:
        raise ValueError(f"low={low} must not be above high={high}")
    x = np.round(255 * as_floats(picture)).astype(np.int64)
    dy, dx = _gradient(x, np.array([1, 2, 1]), np.array([-1, 0, 1]))
    strongest = (np.abs(dx) + np.abs(dy)).argmax(-1)[..., None]
    dx, dy = (np.take_along_axis(d, strongest, -1)[..., 0] for d in (dx, dy))
    size = np.abs(dx) + np.abs(dy)
    around = np.pad(size, 1)
    height, width = size.shape

    def beside(down: int, right: int) -> np.ndarray:
        """The size that far away, 0 outside."""
        return around[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    across, along = np.abs(dx), np.abs(dy) << 15
    horizontal = along < TANGENT[0] * across
    vertical = along > TANGENT[1] * across
    falling = (dx < 0) != (dy < 0)
    first = np.select(
        [horizontal, vertical, falling], [beside(0, -1), beside(-1, 0), beside(-1, 1)],
        beside(-1, -1),
    )  # fmt: skip
    second = np.select(
        [horizontal, vertical, falling], [beside(0, 1), beside(1, 0), beside(1, -1)], beside(1, 1)
    )
    straight = horizontal | vertical
    peak = (size > first) & np.where(straight, size >= second, size > second)
    thin = peak & (size > np.floor(low))
    label, _ = ndimage.label(thin, SQUARE)
    strong = np.unique(label[thin & (size > np.floor(high))])
    return as_map(np.isin(label, strong[strong > 0]))


def soft_edges(picture: np.ndarray, sigma: float = 1.0, full: float = 0.25) -> np.ndarray:
    """The size of Scharr's gradient, of the channel where it is largest.

    Args:
      picture: [H, W, 3 or 1].
      sigma: of the Gaussian that smoothes the picture first, in pixels; 0: none.
      full: gradient that is white, in units of black to white per pixel.
    """
    check_range("sigma", sigma, 0, 100)
    check_range("full", full, 0, 1, above=True)
    return as_map(_scharr(_smoothed(as_floats(picture), sigma)) / full)


def scribble(
    picture: np.ndarray, sigma: float = 2.0, threshold: float = 0.05, width: int = 4
) -> np.ndarray:
    """Thick strokes along the edges of what is large: white or black, nothing between.

    The strokes' middle is where Scharr's gradient of the smoothed picture has a maximum across the
    edge.

    Args:
      picture: [H, W, 3 or 1].
      sigma: of the Gaussian that smoothes the picture, in pixels.
      threshold: least gradient, in units of black to white per pixel.
      width: of a stroke, in pixels.
    """
    check_range("sigma", sigma, 0, 100)
    check_range("threshold", threshold, 0, 1, above=True)
    check_range("width", width, 1, 100)
    smooth = _smoothed(as_floats(picture), sigma)
    size, (dy, dx) = _scharr(smooth), np.gradient(grey(smooth))
    across = np.hypot(dx, dy) + 1e-12
    rows, columns = np.indices(size.shape)
    ahead, behind = (
        ndimage.map_coordinates(
            size, [rows + s * dy / across, columns + s * dx / across], order=1, mode="nearest"
        )
        for s in (1, -1)
    )
    thin = (size >= threshold) & (size >= ahead) & (size > behind)
    if not thin.any():
        return as_map(thin)
    return as_map(ndimage.distance_transform_edt(~thin) <= width / 2)


def lineart(
    picture: np.ndarray, sigma: float = 1.0, ratio: float = 1.6, full: float = 0.1
) -> np.ndarray:
    """Dark lines, and the dark side of edges: a difference of Gaussians of the grey picture.

    The wide Gaussian's picture minus the narrow one's, over ``full``, where that is positive.

    Args:
      picture: [H, W, 3 or 1].
      sigma: of the narrow Gaussian, in pixels: about half the width of lines.
      ratio: the wide one's sigma over it.
      full: difference that is white, 1 from black to white.
    """
    check_range("sigma", sigma, 0, 100, above=True)
    check_range("ratio", ratio, 1, 100, above=True)
    check_range("full", full, 0, 1, above=True)
    x = grey(as_floats(picture))
    narrow, wide = (ndimage.gaussian_filter(x, s, mode="nearest") for s in (sigma, ratio * sigma))
    return as_map((wide - narrow) / full)


def _smoothed(x: np.ndarray, sigma: float) -> np.ndarray:
    return ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest") if sigma else x


def _scharr(x: np.ndarray) -> np.ndarray:
    """The largest gradient [H, W] of the channels of x [H, W, C], per pixel."""
    gradient = _gradient(x, np.array([3, 10, 3]) / 16, np.array([-1, 0, 1]) / 2)
    return np.hypot(*gradient).max(-1)


def _gradient(x: np.ndarray, sides: np.ndarray, slope: np.ndarray) -> list[np.ndarray]:
    """Down and to the right, of each channel of x [H, W, C]."""
    found = []
    for axis in (0, 1):
        along = ndimage.correlate1d(x, slope, axis, mode="nearest")
        found.append(ndimage.correlate1d(along, sides, 1 - axis, mode="nearest"))
    return found
