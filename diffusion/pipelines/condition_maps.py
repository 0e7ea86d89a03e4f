"""From specs to the maps that ControlNets follow: ``canny(net="DIR", image="x.png", low=50)``."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image, ImageOps

from diffusion import conditions
from diffusion.conditions import colours, given
from diffusion.conditions.ade20k import PALETTE
from diffusion.data import images
from diffusion.errors import check_range, field
from diffusion.evaluation.figures import to_uint8
from diffusion.pipelines import picture_files

Pictures = Mapping[str, np.ndarray]
"""What pictures are made from, [H, W, C] in [-1, 1] and a mask in [0, 1]: "image" and "mask"."""


@dataclass(frozen=True)
class Control:
    """A network, the map that it follows, and how; this one's map is computed from a photograph.

    Attributes:
      net: a ControlNet or T2I-Adapter: a folder as diffusers saves it, a file in the original
        naming, an id on the Hugging Face hub, or the workdir of a run that trained a ControlNet;
        empty: the model's own, where the model is such a run.
      image: a picture's file; empty: the one that pictures are made from.
      scale: factor of what the net adds, or one for each of the places where it adds something.
      start, end: the net acts in step i of n where i / n >= start and (i + 1) / n <= end.
      guess: the net guides even without a prompt: it acts the less the finer a feature is, and
        with guidance only on what is steered towards.
      bgr, pool: what a file without a config does not say: the net reads the map's channels as
        blue, green and red; it takes means over the picture (the published net for "shuffle").
      name: what the map is called.
      function: the map [H, W, 3] of a picture; its options are attributes too.
    """

    net: str = ""
    image: str = ""
    scale: float | Sequence[float] = 1.0
    start: float = 0.0
    end: float = 1.0
    guess: bool = False
    bgr: bool = False
    pool: bool = False

    name: ClassVar[str]
    function: ClassVar[Callable[..., np.ndarray]]

    def __post_init__(self) -> None:
        for scale in np.atleast_1d(self.scale):
            check_range("scale", scale, 0)
        check_range("start", self.start, 0, 1)
        check_range("end", self.end, 0, 1)
        if self.start >= self.end:
            raise ValueError(f"start={self.start} must be below end={self.end}")

    @property
    def options(self) -> dict[str, float]:
        """Those of ``function``."""
        parameters = inspect.signature(self.function).parameters.values()
        return {p.name: getattr(self, p.name) for p in parameters if p.default is not p.empty}

    def map(self, size: tuple[int, int], pictures: Pictures) -> np.ndarray:
        """[H, W, 3] of ``size`` (height, width) pixels, in [0, 1], float32.

        Raises:
          ValueError, FileNotFoundError: there is no picture, it cannot be read, or an option is out
            of range.
        """
        return self.function(self.photograph(size, pictures), **self.options)

    def photograph(self, size: tuple[int, int], pictures: Pictures) -> np.ndarray:
        """uint8 [H, W, C]."""
        if not self.image:
            if "image" not in pictures:
                raise ValueError(
                    f'{self.name} needs image="x.png", a file: there is no picture from which '
                    "pictures are made"
                )
            return to_uint8(pictures["image"])
        with field(f"image={self.image!r}"):
            return to_uint8(picture_files.read_image(self.image, size))


@dataclass(frozen=True)
class Given(Control):
    """With a map that is itself given, in colours."""

    resampling: ClassVar[Image.Resampling] = Image.Resampling.BICUBIC

    def map(self, size: tuple[int, int], pictures: Pictures) -> np.ndarray:
        """As ``Control.map``."""
        if not self.image:
            raise ValueError(f'{self.name} needs image="x.png", the map itself')
        with field(f"image={self.image!r}"):
            made = self.function(self.values(), **self.options)
            channels = [
                images.fit(Image.fromarray(channel), *size, resampling=self.resampling)
                for channel in np.moveaxis(made, -1, 0).copy()
            ]
        return np.clip(np.concatenate(channels, axis=-1), 0, 1)

    def values(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return _colours(self.image)


@dataclass(frozen=True)
class Depth(Given):
    """With a map of depth, of 8 or 16 bits or of floats; it may be a ``.npy`` file."""

    def values(self) -> np.ndarray:
        """[H, W] or [H, W, 3]."""
        stored = _stored(self.image)
        return _colours(self.image) if stored is None else stored


@dataclass(frozen=True)
class Classes(Given):
    """With a map of classes, which may be a ``.npy`` file, or of their colours."""

    resampling: ClassVar[Image.Resampling] = Image.Resampling.NEAREST

    def values(self) -> np.ndarray:
        """Labels [H, W], or colours, uint8 [H, W, 3]."""
        stored = _stored(self.image)
        if stored is not None:
            return stored
        seen = _colours(self.image)
        if images.mode(self.image).split()[0] == "P":
            known = {(0, 0, 0), *map(tuple, PALETTE.tolist())}
            if not known.issuperset(map(tuple, np.unique(seen.reshape(-1, 3), axis=0).tolist())):
                return _upright(self.image)
        return seen


@dataclass(frozen=True)
class Repainted(Control):
    """With what is left of a picture beside a mask.

    Attributes:
      mask: a picture's file, white where it is painted; empty: that of the picture.
    """

    mask: str = ""

    def map(self, size: tuple[int, int], pictures: Pictures) -> np.ndarray:
        """As ``Control.map``; -1 where it is painted."""
        if not self.mask and "mask" not in pictures:
            raise ValueError(f'{self.name} needs mask="x.png", a file: nothing is repainted')
        with field(f"mask={self.mask!r}"):
            mask = picture_files.read_mask(self.mask, size) if self.mask else pictures["mask"]
        return self.function(self.photograph(size, pictures), mask)


def _kind(name: str, function: Callable[..., np.ndarray], base: type[Control]) -> type[Control]:
    """``base`` with the options of a function."""
    hints = typing.get_type_hints(function)
    own = [
        (p.name, hints[p.name], p.default)
        for p in inspect.signature(function).parameters.values()
        if p.default is not p.empty
    ]
    shared = {"name": name, "function": staticmethod(function), "__doc__": base.__doc__}
    return make_dataclass(name, own, bases=(base,), namespace=shared, frozen=True)


CHOICES = {
    name: _kind(name, function, base)
    for name, function, base in (
        *((name, function, Control) for name, function in conditions.CHOICES.items()),
        ("tile", colours.picture, Control),
        ("inpaint", given.inpaint, Repainted),
        ("depth", given.depth, Depth),
        ("segmentation", given.segmentation, Classes),
        ("pose", colours.picture, Given),
        ("normal", colours.picture, Given),
        ("map", colours.picture, Given),
    )
}
"""Kinds of maps by name."""


def _stored(path: str) -> np.ndarray | None:
    """The numbers [H, W] or [H, W, 1 or 3] that a file of one channel or a ``.npy`` file holds,
    None for a picture in colours."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"no such picture: {path}")
    if path.endswith(".npy"):
        try:
            values = np.load(path, allow_pickle=False)
        except (ValueError, OSError, EOFError):
            raise ValueError("it is no array that NumPy reads without unpickling") from None
        fits = values.ndim in (2, 3) and values.shape[2:] in ((), (1,), (3,)) and values.size
        if values.dtype.kind not in "uif" or not fits:
            raise ValueError(f"it holds {values.dtype} of shape {values.shape}; expected [H, W]")
        return values
    try:
        stored = images.mode(path).split()[0] in ("1", "L", "I", "F", "I;16", "I;16B")
    except OSError:  # no picture, which reading its colours says better
        return None
    return _upright(path) if stored else None


def _upright(path: str) -> np.ndarray:
    """The numbers of a picture as they are stored, turned as its EXIF data say."""
    with Image.open(path) as image:
        return np.asarray(ImageOps.exif_transpose(image))


def _colours(path: str) -> np.ndarray:
    """uint8 [H, W, 3]."""
    return to_uint8(picture_files.read_image(path))
