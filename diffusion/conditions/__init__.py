"""Condition maps: what a ControlNet or a T2I-Adapter follows, of pictures, without any weights."""

from __future__ import annotations

from diffusion.conditions.colours import blur, picture, segments, shuffle
from diffusion.conditions.edges import canny, lineart, scribble, soft_edges

CHOICES = {
    f.__name__: f for f in (canny, soft_edges, scribble, lineart, segments, blur, shuffle, picture)
}
"""Functions of a picture [H, W, C], uint8 or in [0, 1] -> its map [H, W, 3] in [0, 1]."""
