"""A subject in a few pictures, beside pictures of its class, as DreamBooth learns it.

Every second example of a batch is one of the class (Ruiz et al., 2023, section 4.2), so that a few
pictures of the subject and hundreds of its class count alike.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from diffusion.data import image_source
from diffusion.data.images import WHITE
from diffusion.data.sources import Pictures, Source

NOTE = "the subject's pictures are all trained on: none of them is held out"


def source(
    name: str,
    subject: Sequence[Path],
    prompt: str,
    of_class: Sequence[Path] = (),
    class_prompt: str = "",
    *,
    channels: int = 3,
    background: tuple[int, int, int] = WHITE,
) -> Source:
    """Pictures of a subject, all with one caption, and then those of its class with theirs.

    Batches have the column ``prior`` [B] float32, 1 for the class's pictures and 0 for the
    subject's; without pictures of the class there is no such column.
    """
    files, counts = (*subject, *of_class), (len(subject), len(of_class))
    columns = {"prior": np.repeat(np.float32([0, 1]), counts)} if of_class else {}
    names = tuple(map(str, files))
    get, called = (partial(operator.getitem, values) for values in (files, names))
    pictures = Pictures(len(files), get, called, columns)
    made = image_source.from_pictures(name, pictures, (0, 0, channels), background=background)
    captions = (prompt,) * counts[0] + (class_prompt,) * counts[1]
    shares = counts if of_class else ()
    return dataclasses.replace(made, captions=captions, shares=shares, note=NOTE)
