"""Images with captions, for text to image.

An ``.npz`` holds ``images`` [N, H, W, 1, 3 or 4] uint8 and ``caption`` [N]. Transparent images are
laid on a background, and all images get one size. A fixed share of the captions is held out:
training never sees these captions, but it sees all of their words.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffusion.data import sources

WORD = re.compile(r"\w+")


class Pairs(NamedTuple):
    """Images [N, H, W, C] uint8, as they are stored, and captions, N."""

    images: np.ndarray
    captions: tuple[str, ...]


def read(path: str | Path, keep: Callable[[dict[str, str]], bool] | None = None) -> Pairs:
    """The pairs in an ``.npz``, or in a folder of several, whose images must have one size.

    ``keep`` decides from an example's texts (``caption`` and other text arrays) whether it stays.
    """
    path = Path(path)
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    if not files or not files[0].exists():
        raise FileNotFoundError(
            f"no captioned images at {path}: expected an .npz with 'images' [N, H, W, C] uint8 and "
            "'caption' [N], or a folder with such files"
        )
    parts = [_read_file(file, keep) for file in files]
    sizes = {part.images.shape[1:] for part in parts}
    if len(sizes) > 1:
        raise ValueError(f"{path} holds images of several shapes: {sorted(sizes)}")
    captions = tuple(caption for part in parts for caption in part.captions)
    return Pairs(np.concatenate([part.images for part in parts]), captions)


def _read_file(path: Path, keep: Callable[[dict[str, str]], bool] | None) -> Pairs:
    file = sources.read_npz(path)
    images = file.get("images", file.get("image"))
    if images is None or "caption" not in file:
        raise ValueError(f"{path} needs 'images' and 'caption', it has {sorted(file)}")
    check_images(images, f"{path}: 'images'")
    captions = texts_of(file["caption"], len(images), f"{path}: 'caption'")
    if keep is not None:
        texts = {n: x for n, x in file.items() if x.dtype.kind == "U" and x.ndim == 1}
        rows = ({name: str(v[i]) for name, v in texts.items()} for i in range(len(images)))
        index = [i for i, row in enumerate(rows) if keep(row)]
        images, captions = images[index], [captions[i] for i in index]
    return Pairs(images, tuple(captions))


def check_images(images: np.ndarray, at: str) -> None:
    """Raises ValueError unless images are uint8 [N, H, W, 1, 3 or 4]."""
    if images.ndim != 4 or images.dtype != np.uint8 or images.shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{at} must be uint8 [N, H, W, 1, 3 or 4], got {images.dtype} {images.shape}"
        )


def texts_of(captions: np.ndarray, count: int, at: str) -> list[str]:
    """An array of captions as texts; raises ValueError unless there are ``count``."""
    if captions.dtype.kind != "U" or captions.shape != (count,):
        raise ValueError(f"{at} must be {count} strings, one per image")
    return [str(caption) for caption in captions]


def tiles(path: str | Path) -> Pairs:
    """The tiles of Dungeon Crawl Stone Soup that show a whole thing.

    Parts of the player's figure, which the game lays over each other, and unused tiles are left
    out.
    """

    def keep(row: dict[str, str]) -> bool:
        part = row.get("category") in ("player", "UNUSED")
        return not part and "unused" not in row["caption"].lower()

    return read(path, keep)


def resize(images: np.ndarray, size: int, background: Sequence[int]) -> np.ndarray:
    """RGB [N, size, size, 3] uint8 of images [N, H, W, 1, 3 or 4], laid on a background colour.

    Whole factors use means of blocks or repeated pixels, other factors bicubic interpolation.
    """
    if images.shape[-1] == 4:
        opacity = images[..., 3:].astype(np.float32) / 255
        below = np.asarray(background, np.float32)
        images = np.round(opacity * images[..., :3] + (1 - opacity) * below).astype(np.uint8)
    images = np.broadcast_to(images, (*images.shape[:3], 3))
    height, width = images.shape[1:3]
    if height == width == size:
        return np.ascontiguousarray(images)
    method = Image.Resampling.BICUBIC
    if height % size == 0 and width % size == 0:
        method = Image.Resampling.BOX
    elif size % height == 0 and size % width == 0:
        method = Image.Resampling.NEAREST
    return np.stack([np.asarray(Image.fromarray(x).resize((size, size), method)) for x in images])


def held_out_captions(captions: Sequence[str], share: float, seen: int = 3) -> frozenset[str]:
    """About ``share`` of the different captions, in lower case; every run gets the same ones.

    Every word of a held-out caption occurs in at least ``seen`` captions that are not held out.
    The hash of a caption decides. If there are too few such captions, fewer are held out, but at
    least one.
    """
    if not 0 < share < 1:
        raise ValueError(f"the share of captions held out must lie in (0, 1), got {share}")
    lower = {caption.lower() for caption in captions}
    unique = sorted(lower, key=lambda c: hashlib.sha256(c.encode()).digest())
    if len(unique) < 2:
        raise ValueError(f"expected at least two different captions, got {len(unique)}")
    words = {caption: set(WORD.findall(caption)) for caption in unique}
    count = Counter(word for used in words.values() for word in used)
    chosen = []
    for caption in unique:
        if len(chosen) >= share * len(unique):
            break
        if words[caption] and all(count[word] > seen for word in words[caption]):
            chosen.append(caption)
            count.subtract(words[caption])
    return frozenset(chosen or unique[:1])


def split(pairs: Pairs, name: str, share: float) -> Pairs:
    """The pairs of ``train`` or ``test``: no caption is in both, whatever its case."""
    sources.check_split(name, "captioned images")
    held_out = held_out_captions(pairs.captions, share)
    index = [i for i, c in enumerate(pairs.captions) if (c.lower() in held_out) == (name == "test")]
    return Pairs(pairs.images[index], tuple(pairs.captions[i] for i in index))
