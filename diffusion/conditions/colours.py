"""What is left of a picture when something is taken away: its shapes, its details or its texture.

Each function takes a picture [H, W, 3 or 1], uint8 or of floats in [0, 1], and gives [H, W, 3] in
[0, 1], float32.
"""

from __future__ import annotations

import numpy as np
from scipy import ndimage

from diffusion.conditions.pixels import as_floats, as_map
from diffusion.errors import check_range

TO_XYZ = np.array(
    [[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750],
     [0.0193339, 0.1191920, 0.9503041]]
)  # fmt: skip
"""Linear sRGB to XYZ, under the white of D65 (IEC 61966-2-1)."""


def picture(picture: np.ndarray) -> np.ndarray:
    """The picture as it is, in colours."""
    return as_map(as_floats(picture))


def blur(picture: np.ndarray, sigma: float = 4.0) -> np.ndarray:
    """The picture through a Gaussian of ``sigma`` pixels."""
    check_range("sigma", sigma, 0, 1000)
    x = as_floats(picture)
    return as_map(ndimage.gaussian_filter(x, (sigma, sigma, 0), mode="nearest"))


def shuffle(picture: np.ndarray, seed: int = 0, cell: int = 256) -> np.ndarray:
    """The picture's colours and textures without its content: pixels come from places that are a
    smooth random function of theirs.

    Args:
      picture: [H, W, 3 or 1].
      seed: of that function; the same seed gives the same map.
      cell: pixels between its independent values.
    """
    check_range("seed", seed, 0, 2**31)
    check_range("cell", cell, 1, 10_000)
    x = as_floats(picture)
    height, width = x.shape[:2]
    random = np.random.default_rng(seed)
    places = []
    for side in (height, width):
        few = random.uniform(size=(height // cell + 2, width // cell + 2))
        at = np.mgrid[:height, :width] / cell
        smooth = ndimage.map_coordinates(few, at, order=1)
        low, high = smooth.min(), smooth.max()
        places.append((smooth - low) / max(high - low, 1e-12) * (side - 1))
    channels = [ndimage.map_coordinates(c, places, order=1) for c in np.moveaxis(x, -1, 0)]
    return as_map(np.stack(channels, axis=-1))


def segments(picture: np.ndarray, count: int = 200, compactness: float = 10.0) -> np.ndarray:
    """Superpixels in their mean colours: SLIC (Achanta et al., 2012), ten rounds.

    K-means of colours in CIELAB and places, in which each pixel chooses among the centres of the
    nine cells of a regular grid around it; distances of a cell's side count like ``compactness``
    units of colour.

    Args:
      picture: [H, W, 3 or 1].
      count: of superpixels, about.
      compactness: how much places count: small follows colours, large gives squares.
    """
    check_range("count", count, 1, 1_000_000)
    check_range("compactness", compactness, 0, 1e6, above=True)
    x = as_floats(picture)
    height, width = x.shape[:2]
    side = max(np.sqrt(height * width / count), 1)
    rows, columns = max(round(height / side), 1), max(round(width / side), 1)
    y, z = np.mgrid[:height, :width]
    at = np.stack([y, z], -1) * (compactness / side)
    features = np.concatenate([lab(np.broadcast_to(x, (height, width, 3))), at], -1)
    cell = y * rows // height, z * columns // width
    labels, total = cell[0] * columns + cell[1], rows * columns
    centres = _means(features, labels, np.zeros((total, 5)))
    for _ in range(10):
        best = np.full((height, width), np.inf)
        for down in (-1, 0, 1):
            for right in (-1, 0, 1):
                row, column = cell[0] + down, cell[1] + right
                inside = (row >= 0) & (row < rows) & (column >= 0) & (column < columns)
                own = np.where(inside, row * columns + column, 0)
                distance = ((features - centres[own]) ** 2).sum(-1)
                nearer = inside & (distance < best)
                best, labels = np.where(nearer, distance, best), np.where(nearer, own, labels)
        centres = _means(features, labels, centres)
    return as_map(_means(x, labels, np.zeros((total, x.shape[-1])))[labels])


def lab(rgb: np.ndarray) -> np.ndarray:
    """CIELAB [..., 3] of sRGB [..., 3] in [0, 1]: L from 0 to 100."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    ratio = linear @ TO_XYZ.T / TO_XYZ.sum(1)  # to white
    bent = np.where(ratio > (6 / 29) ** 3, np.cbrt(ratio), ratio * (29 / 6) ** 2 / 3 + 4 / 29)
    x, y, z = np.moveaxis(bent, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], -1)


def _means(x: np.ndarray, labels: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """The mean of x [H, W, C] of each label [K, C]; ``empty`` of those that no pixel has."""
    flat, count = labels.ravel(), len(empty)
    size = np.bincount(flat, minlength=count)
    sums = [np.bincount(flat, c.ravel(), count) for c in np.moveaxis(x, -1, 0)]
    means = np.stack(sums, -1) / np.maximum(size, 1)[:, None]
    return np.where(size[:, None] > 0, means, empty)
