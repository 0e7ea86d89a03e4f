"""Pictures of any size, mode and format as arrays of one size, in colour or grey.

Of a picture the first frame is read, turned upright (EXIF), with 8 bits per channel, and laid on a
background where it is transparent. Colour profiles are not applied. The picture is resized until it
just covers the target height and width, and then cropped to them.
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

Picture = str | Path | bytes | np.ndarray | Image.Image
"""A file, its contents, uint8 [H, W] or [H, W, 1, 3 or 4], or Pillow's own."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

GAP = 2.0
"""How much larger than its target a picture may be before the final, bicubic resizing. Larger ones
are first reduced by whole factors, by means of blocks (JPEGs while they are decoded)."""

WHITE = (255, 255, 255)  # RGB
ORIENTATION = 0x0112  # the EXIF tag
SIDEWAYS = (5, 6, 7, 8)  # its values where height and width are exchanged
TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableError(ValueError):
    """A picture cannot be read; says why."""


def size(picture: Picture) -> tuple[int, int]:
    """(height, width) when upright, from the header alone, without decoding."""
    if isinstance(picture, np.ndarray):
        return picture.shape[:2]
    try:
        with _open(picture) as image:
            return _upright_size(image)
    except Exception as error:  # Pillow's readers raise errors of many kinds
        raise UnreadableError(_cause(error)) from error


def decode(
    picture: Picture,
    *,
    channels: int = 3,
    background: tuple[int, int, int] = WHITE,
    covering: tuple[int, int] | None = None,
) -> Image.Image:
    """The whole picture, in RGB (3 channels) or grey (1), on a colour ``background`` (RGB).

    With a target size ``covering`` (H, W), a JPEG may be decoded at a reduced size, of at least
    ``GAP`` times the target. UnreadableError: it is damaged, or its values have no fixed range.
    """
    try:
        if isinstance(picture, np.ndarray):
            grey = picture.ndim == 3 and picture.shape[-1] == 1
            image = Image.fromarray(picture[..., 0] if grey else picture)
            return _flatten(image, channels, background)
        with _open(picture) as image:
            if covering is not None and image.format == "JPEG":
                height, width = _upright_size(image)
                scale = GAP * max(covering[0] / height, covering[1] / width)
                if scale < 1:
                    room = tuple(int(np.ceil(scale * side)) for side in image.size)
                    image.draft(None, room)
            image.load()
            turned = TRANSPOSE.get(_orientation(image))
            flat = _flatten(image, channels, background)
            return flat if turned is None else flat.transpose(turned)
    except Exception as error:
        raise UnreadableError(_cause(error)) from error


def fit(
    image: Image.Image,
    height: int,
    width: int,
    at: tuple[float, float] = (0.5, 0.5),
    resampling: Image.Resampling = Image.Resampling.BICUBIC,
) -> np.ndarray:
    """[height, width, C] of a picture in RGB or grey, or of floats: resized to cover, and cropped.

    Bicubic by default, and antialiased: a picture that becomes smaller is filtered at the new
    resolution, which plain interpolation omits. (Box filters blur, Lanczos filters ring at hard
    edges.) ``at`` says where to crop: 0 keeps the top or left, 1 the bottom or right, 0.5 the
    middle.
    """
    if image.size != (width, height):
        scale = max(height / image.height, width / image.width)
        inside = min(width / scale, image.width), min(height / scale, image.height)
        left, top = at[1] * (image.width - inside[0]), at[0] * (image.height - inside[1])
        box = (left, top, left + inside[0], top + inside[1])
        image = image.resize((width, height), resampling, box, reducing_gap=GAP)
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def mode(picture: Picture) -> str:
    """How the picture is stored: Pillow's mode, with "rotated" and the like where it applies."""
    if isinstance(picture, np.ndarray):
        return {1: "L", 3: "RGB", 4: "RGBA"}[1 if picture.ndim == 2 else picture.shape[-1]]
    with _open(picture) as image:
        more = {
            " transparent": "transparency" in image.info,
            " rotated": _orientation(image) in TRANSPOSE,
            " animated": getattr(image, "n_frames", 1) > 1,
        }
        return image.mode + "".join(word for word, applies in more.items() if applies)


def _open(picture: Picture) -> Image.Image:
    if isinstance(picture, Image.Image):
        return picture.copy()
    return Image.open(io.BytesIO(picture) if isinstance(picture, bytes) else picture)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    # Pillow would decode a PNG to look for tags behind the pixels.
    known = image.format != "PNG" or "exif" in image.info
    sideways = known and _orientation(image) in SIDEWAYS
    return (width, height) if sideways else (height, width)


def _orientation(image: Image.Image) -> int | None:
    """The EXIF orientation that is not yet applied; Pillow turns TIFFs by itself."""
    return None if image.format == "TIFF" else image.getexif().get(ORIENTATION)


def _flatten(image: Image.Image, channels: int, background: tuple[int, int, int]) -> Image.Image:
    """The picture with 8 bits, without transparency, in RGB or grey."""
    if image.mode.startswith("I"):  # 16 bits, which Pillow also reads into 32
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65_535:
            raise ValueError(
                f"it has values {values.min()} to {values.max()}; expected 8 or 16 bits per channel"
            )
        clear = image.info.get("transparency")
        image = Image.fromarray(np.round(values / 257).astype(np.uint8))
        if isinstance(clear, int):
            image.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    if image.mode == "F":
        raise ValueError("its values are floats, of no fixed range; expected 8 or 16 bits")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        below = Image.new("RGB", image.size, tuple(background))
        below.paste(image, mask=image.getchannel("A"))
        image = below
    target = "L" if channels == 1 else "RGB"
    return image if image.mode == target else image.convert(target)


def _cause(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "it is not a picture, or has an unknown format"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return f"{error}" if str(error) else type(error).__name__
