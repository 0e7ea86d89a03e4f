"""The pretrained world: what other libraries' files mean here.

``load`` and ``save`` take and give a model's folder; ``open_model`` and ``nbytes`` tell what is in
one, and what it would take, without reading weights.
"""

from diffusion.pretrained.index import Index, nbytes, read_index, save_index
from diffusion.pretrained.models import Loaded, Model, load, open_model, save

__all__ = [
    "Index",
    "Loaded",
    "Model",
    "load",
    "nbytes",
    "open_model",
    "read_index",
    "save",
    "save_index",
]
