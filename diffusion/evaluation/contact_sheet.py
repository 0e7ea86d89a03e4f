"""A page of pictures, each with its description, and below them diagrams of the data."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import findfont
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from diffusion.evaluation.figures import BLUE, GRAY, INK, MUTED, PAPER, Plot, new_figure, to_uint8

FONT = findfont("DejaVu Sans")  # Matplotlib brings it; it knows most alphabets
CELL = 112  # pixels
GAP = 10
MARGIN = 20
LINES = 3  # of text below a picture
TEXT = 11  # its height


def contact_sheet(
    pictures: Sequence[np.ndarray],
    texts: Sequence[str],
    *,
    title: str,
    subtitle: str = "",
    columns: int = 10,
    plots: Sequence[Plot] = (),
) -> np.ndarray:
    """The page, uint8 [h, w, 3].

    Args:
      pictures: each [H, W, 1 or 3] in [-1, 1], of any sizes; small ones are enlarged by whole
        factors, large ones reduced.
      texts: the descriptions beneath the pictures; cut after a few lines.
      title, subtitle: of the page.
      columns: pictures in a row.
      plots: each draws one of the diagrams, which stand side by side.
    """
    small = ImageFont.truetype(FONT, TEXT)
    per_line = max(8, int(CELL / small.getlength("abcdefghij") * 10))
    lines = [_wrapped(text, per_line) for text in texts]
    rows = [slice(i, i + columns) for i in range(0, len(pictures), columns)]
    thumbs = [_thumb(picture) for picture in pictures]
    heights = [max(t.height for t in thumbs[row]) for row in rows]
    spaces = [max((len(line) for line in lines[row]), default=0) * (TEXT + 3) + 4 for row in rows]
    width = 2 * MARGIN + columns * CELL + (columns - 1) * GAP
    top = MARGIN + (52 if subtitle else 32)
    page = Image.new("RGB", (width, top + sum(heights) + sum(spaces) + GAP * len(rows)), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN - 4), title, fill=INK, font=ImageFont.truetype(FONT, 18))
    draw.text((MARGIN, MARGIN + 22), subtitle, fill=MUTED, font=ImageFont.truetype(FONT, 12))
    y = top
    for row, height, space in zip(rows, heights, spaces):
        for column, (thumb, words) in enumerate(zip(thumbs[row], lines[row])):
            x = MARGIN + column * (CELL + GAP)
            page.paste(thumb, (x + (CELL - thumb.width) // 2, y + (height - thumb.height) // 2))
            for k, line in enumerate(words):
                place = (x + CELL // 2, y + height + 4 + k * (TEXT + 3))
                draw.text(place, line, fill=INK, font=small, anchor="ma")
        y += height + space + GAP
    sheet = np.asarray(page)
    return np.concatenate([sheet, _diagrams(plots, width)]) if plots else sheet


def histogram(title: str, edges: np.ndarray, counts: np.ndarray, colours: Sequence[str]) -> Plot:
    """Lines of counts [C, K] between edges [K + 1], one per channel."""

    def plot(axes: Axes) -> None:
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        for values, colour in zip(share, colours):
            axes.stairs(values, edges, color=colour, linewidth=1.2)
        axes.set(title=title, yticks=[], xlim=(edges[0], edges[-1]))
        # A background alone may be most of the pixels.
        axes.set_ylim(0, 1.15 * max(np.sort(share, axis=None)[-4 * len(share)], 1e-6))

    return plot


def bars(title: str, names: Sequence[str], counts: Sequence[int], most: int = 12) -> Plot:
    """Horizontal bars, the first ``most`` of them."""

    def plot(axes: Axes) -> None:
        shown = [name if len(name) < 20 else name[:18] + "…" for name in names[:most]]
        place = np.arange(len(shown))
        axes.barh(place, counts[:most], color=BLUE)
        axes.set(title=title, yticks=place, yticklabels=shown, xticks=[])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(max(len(shown), 6) - 0.4, -0.6)
        style = {"va": "center", "fontsize": 6, "color": MUTED, "clip_on": False}
        for k, count in enumerate(counts[:most]):
            axes.annotate(f" {count:,}", (count, k), **style)
        axes.margins(x=0.2)
        if len(names) > most:
            axes.set_xlabel(f"and {len(names) - most:,} more", color=MUTED)

    return plot


def columns(title: str, values: np.ndarray, limit: float | None = None, unit: str = "") -> Plot:
    """A histogram of whole numbers; a dashed line at ``limit``."""

    def plot(axes: Axes) -> None:
        low, high = int(values.min()), int(values.max())
        bins = np.arange(low, high + 2) if high - low < 60 else 50
        axes.hist(values, bins=bins, color=BLUE, align="left" if np.ndim(bins) else "mid")
        if limit is not None:
            axes.axvline(limit, color=GRAY, linestyle="--", linewidth=1)
        axes.set(title=title, yticks=[], xlabel=unit, xlim=(min(low, high - 4) - 1, high + 1.5))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    return plot


def _thumb(picture: np.ndarray) -> Image.Image:
    array = to_uint8(picture)
    image = Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array).convert("RGB")
    longest = max(image.size)
    if longest <= CELL:
        size = [side * (CELL // longest) for side in image.size]
        return image.resize(size, Image.Resampling.NEAREST)
    size = [max(1, side * CELL // longest) for side in image.size]
    return image.resize(size, Image.Resampling.LANCZOS)


def _wrapped(text: str, width: int) -> list[str]:
    lines = textwrap.wrap(text, width, break_on_hyphens=False)
    if len(lines) > LINES:
        lines[LINES - 1 :] = [lines[LINES - 1][: width - 1] + "…"]
    return lines


def _diagrams(plots: Sequence[Plot], width: int) -> np.ndarray:
    file = io.BytesIO()
    with new_figure(file, width / 150, 1.7) as figure:
        for axes, plot in zip(np.atleast_1d(figure.subplots(1, len(plots))), plots):
            plot(axes)
            axes.tick_params(labelsize=6)
            axes.xaxis.label.set_fontsize(6)
            axes.title.set_fontsize(8)
    image = Image.open(file).convert("RGB")
    page = Image.new("RGB", (width, image.height), PAPER)
    page.paste(image)
    return np.asarray(page)
