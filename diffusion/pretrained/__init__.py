"""Pretrained models in the file formats of other libraries.

``load`` reads a model's folder, and ``save`` writes one. ``open_model`` shows what a folder holds,
without reading weights.
"""

from diffusion.pretrained.index import Index, read_index, save_index
from diffusion.pretrained.models import Loaded, Model, load, open_model, save

__all__ = ["Index", "Loaded", "Model", "load", "open_model", "read_index", "save", "save_index"]
