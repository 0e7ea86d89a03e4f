"""Pictures before and after an edit, with what was asked for, as InstructPix2Pix learns it.

An ``.npz`` holds ``images`` and ``edited`` [N, H, W, 1, 3 or 4] uint8 and ``caption`` [N], the
instructions; of a folder, metadata.jsonl names the files (see ``folder``). A picture may occur with
several edits; all of them are held out, or none.
"""

from __future__ import annotations

import dataclasses
import hashlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from diffusion.data import captions, sources
from diffusion.data.folder import Listing, held_out_by_hash
from diffusion.data.image_source import from_pictures
from diffusion.data.sources import Batch, Read, Source


class Edits(NamedTuple):
    """Pictures before and after [N, H, W, C] uint8, as they are stored, and instructions, N."""

    images: np.ndarray
    edited: np.ndarray
    captions: tuple[str, ...]


def read(path: str | Path, split: str, held_out: float) -> Edits:
    """The edits of ``train`` or ``test`` in an ``.npz``, of whose pictures a share is held out."""
    sources.check_split(split, "edited pictures")
    file = sources.read_npz(path)
    if missing := {"images", "edited", "caption"} - set(file):
        raise ValueError(f"{path} lacks {sorted(missing)}, it has {sorted(file)}")
    images, edited = (file[name] for name in ("images", "edited"))
    for name, array in (("images", images), ("edited", edited)):
        captions.check_images(array, f"{path}: {name!r}")
    if len(images) != len(edited):
        raise ValueError(f"{path}: {len(images)} 'images' but {len(edited)} 'edited'")
    texts = captions.texts_of(file["caption"], len(images), f"{path}: 'caption'")
    names = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    chosen = held_out_by_hash(names, held_out, str(path))
    index = np.flatnonzero(chosen == (split == "test"))
    return Edits(images[index], edited[index], tuple(texts[i] for i in index))


def from_arrays(name: str, edits: Edits, size: int, background: tuple[int, int, int]) -> Source:
    """A source over edits in memory, in squares of ``size``."""
    both = (captions.resize(x, size, background) for x in (edits.images, edits.edited))
    given, made = (sources.from_arrays(name, x) for x in both)
    return dataclasses.replace(paired(made, given), captions=edits.captions)


def from_listing(
    name: str, listing: Listing, size: int, channels: int, background: tuple[int, int, int]
) -> Source:
    """A source over the edits of a folder, whose files are read as they are needed."""
    if not listing.edited or not listing.captions:
        raise ValueError(
            f"{listing.root} needs a metadata.jsonl with lines such as "
            '{"file_name": "1.png", "edited": "2.png", "text": "make it red"}'
        )
    shape = (size, size, channels)
    both = (listing, dataclasses.replace(listing, files=listing.edited))
    given, made = (from_pictures(name, x.pictures, shape, background=background) for x in both)
    return dataclasses.replace(paired(made, given), captions=listing.captions)


def paired(edited: Source, given: Source) -> Source:
    """``edited`` with the pictures ``given`` to edit as the column ``image`` [B, H, W, C]."""
    read = partial(_both, edited.read, given.read)
    crop = edited.crop and partial(_both, edited.crop, given.crop)
    return dataclasses.replace(edited, read=read, crop=crop)


def _both(edited: Read, given: Read, index: np.ndarray, *at: np.ndarray) -> Batch:
    return edited(index, *at) | {"image": given(index, *at)["x"]}
