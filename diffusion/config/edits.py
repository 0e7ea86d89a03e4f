"""From ``config.data`` to pictures and their edits, InstructPix2Pix's data."""

from __future__ import annotations

from pathlib import Path

from ml_collections import ConfigDict

from diffusion.config import captions
from diffusion.data import edits, folder
from diffusion.data.sources import Source
from diffusion.errors import field


def make_source(c: ConfigDict, split: str) -> Source:
    """The edits of "train" or "test", tokenised if a tokenizer is given.

    Raises:
      ValueError, FileNotFoundError: the message names the field of config.data.
    """
    if not c.dir:
        raise ValueError(
            "config.data.dir must name an .npz of edits, or a folder with metadata.jsonl"
        )
    if c.size < 1:
        raise ValueError(f"config.data.size={c.size} must be the pictures' side in pixels")
    with field(f"config.data.dir={c.dir!r}"):
        made = _read(c, split)
        known = made.captions if split == "train" else _read(c, "train").captions
    return captions.tokenized(c, made, known)


def _read(c: ConfigDict, split: str) -> Source:
    path, background = Path(c.dir), tuple(c.background)
    name = path.resolve().stem
    if path.is_dir():
        listing = folder.read(path, split, c.held_out)
        return edits.from_listing(name, listing, c.size, c.channels or 3, background)
    return edits.from_arrays(name, edits.read(path, split, c.held_out), c.size, background)
