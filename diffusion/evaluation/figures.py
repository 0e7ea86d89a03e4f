"""Pictures: sample grids, loss curves, sampling trajectories, two-dimensional densities."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

Plot = Callable[[Axes], None]

INK, MUTED, PAPER = "#1f2430", "#6b7280", "#ffffff"
BLUE, ORANGE, GRAY = "#2563eb", "#ea580c", "#9ca3af"
SHADES = ("#93c5fd", "#3b82f6", "#1d4ed8", "#172554")  # from clean to noisy
STYLE = {
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GRAY,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "grid.color": "#e5e7eb",
    "legend.frameon": False,
}


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[-1, 1] -> 0..255, rounded; values outside are clipped.

    Raises:
      FloatingPointError: not all are finite.
    """
    images = np.asarray(images, np.float32)
    if not np.isfinite(images).all():
        raise FloatingPointError("pictures have values that are not finite; none is written")
    return np.round((images.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def upscale(image: np.ndarray, factor: int) -> np.ndarray:
    """Nearest-neighbour enlargement of [..., H, W, C] by a whole factor."""
    return np.repeat(np.repeat(image, factor, axis=-3), factor, axis=-2)


def image_grid(
    images: np.ndarray,
    columns: int | None = None,
    *,
    scale: int | None = None,
    gap: int = 2,
    row_names: Sequence[str] = (),
) -> np.ndarray:
    """Tiles images [N, H, W, C] in [-1, 1], row by row; uint8 [h, w, 3].

    With N = classes x columns and images sorted by class, each row is one class.

    Args:
      images: C is 1 (grey) or 3.
      columns: images per row, by default about sqrt(N).
      scale: whole enlargement factor, by default one that makes images at least 48 pixels high.
      gap: white pixels between images.
      row_names: one name per row, written to its left.
    """
    images = np.asarray(images)
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or len(images) == 0:
        raise ValueError(f"expected images [N, H, W, 1 or 3], got {images.shape}")
    n, height = images.shape[:2]
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    if row_names and len(row_names) != rows:
        raise ValueError(f"expected {rows} row names, got {len(row_names)}")
    scale = scale or max(1, -(-48 // height))
    tiles = upscale(to_uint8(images), scale)
    h, w = tiles.shape[1:3]
    grid = np.full((gap + rows * (h + gap), gap + columns * (w + gap), 3), 255, np.uint8)
    for k, tile in enumerate(tiles):
        top, left = gap + k // columns * (h + gap), gap + k % columns * (w + gap)
        grid[top : top + h, left : left + w] = tile
    return _name_rows(grid, row_names, h, gap) if row_names else grid


def _name_rows(grid: np.ndarray, names: Sequence[str], height: int, gap: int) -> np.ndarray:
    font = ImageFont.load_default(size=max(11, min(16, height // 2)))
    width = round(max(font.getlength(name) for name in names)) + 12
    margin = Image.new("RGB", (width, len(grid)), PAPER)
    draw = ImageDraw.Draw(margin)
    for k, name in enumerate(names):
        middle = gap + k * (height + gap) + height // 2
        draw.text((width - 6, middle), name, fill=INK, font=font, anchor="rm")
    return np.concatenate([np.asarray(margin), grid], axis=1)


def save_png(
    path: str | Path, image: np.ndarray, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes uint8 [H, W, C], C = 1 or 3, with ``metadata`` as text chunks (``Image.text``)."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] not in (1, 3):
        raise ValueError(f"expected uint8 [H, W, 1 or 3], got {image.dtype} {image.shape}")
    info = PngImagePlugin.PngInfo()
    for key, value in (metadata or {}).items():
        info.add_itxt(key, value)
    Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(path, pnginfo=info)


def read_png(path: str | Path) -> np.ndarray:
    """uint8 [H, W, C] of a PNG, C = 1 or 3."""
    pixels = np.asarray(Image.open(path))
    return pixels[..., None] if pixels.ndim == 2 else pixels[..., :3]


def read_metrics(path: str | Path, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of ``key`` from a JSON-lines file; a step written twice counts once, last.

    Lines without ``key``, and damaged ones, are passed over; without any, both are empty.
    """
    values = {}
    for line in Path(path).read_bytes().splitlines():
        with suppress(
            ValueError, ArithmeticError, LookupError, TypeError, AttributeError, RecursionError
        ):
            row = json.loads(line)
            if row.get(key) is not None:
                values[int(row["step"])] = float(row[key])
    steps = sorted(values)
    return np.array(steps), np.array([values[step] for step in steps], np.float64)


def smooth(values: np.ndarray, width: float) -> np.ndarray:
    """Gaussian mean over ``width`` points (one standard deviation), normalised at the ends."""
    reach = max(1, int(3 * width))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    total = np.convolve(values, kernel)[reach : reach + len(values)]
    return total / np.convolve(np.ones_like(values), kernel)[reach : reach + len(values)]


def loss_curve(
    path: str | Path, metrics: str | Path, *, key: str = "loss", title: str = ""
) -> None:
    """Draws ``key`` over the steps, raw and smoothed, from a ``metrics.jsonl`` into a PNG.

    Beside it ``validation_<key>``, and in a second panel ``<key>_q1`` to ``<key>_q4``, which are
    quartiles of the noise level, where they were logged. The axes are logarithmic if all values are
    positive and span more than a factor of four.
    """
    steps, values = read_metrics(metrics, key)
    if not len(steps):
        raise ValueError(f"{metrics} has no values of {key!r}")
    finite = values[np.isfinite(values)]
    quartiles = {k: read_metrics(metrics, f"{key}_q{k}") for k in range(1, len(SHADES) + 1)}
    quartiles = {k: found for k, found in quartiles.items() if len(found[0]) > 1}
    held_out = read_metrics(metrics, f"validation_{key}")
    with new_figure(path, 10.5 if quartiles else 7.0, 4.0) as figure:
        left, *right = np.atleast_1d(figure.subplots(1, 2 if quartiles else 1))
        left.plot(steps, values, color=BLUE, alpha=0.3, linewidth=1, label="as logged")
        if len(finite) == len(values) and len(values) >= 8:
            smoothed = smooth(values, max(1.0, len(values) / 80))
            left.plot(steps, smoothed, color=BLUE, linewidth=2, label="smoothed")
            if not len(held_out[0]):
                _annotate_end(left, steps, smoothed, BLUE)
        if len(held_out[0]):
            style = {"color": ORANGE, "linewidth": 1.5, "marker": "o", "markersize": 3}
            left.plot(*held_out, label="held out", **style)
            _annotate_end(left, *held_out, ORANGE)
        left.legend()
        _finish_curves(left, finite, key, title)
        for axes in right:
            names = {1: ", cleanest", len(SHADES): ", noisiest"}
            for (k, (at, curve)), color in zip(quartiles.items(), SHADES):
                if len(curve) >= 8:
                    curve = smooth(curve, max(1.0, len(curve) / 80))
                axes.plot(at, curve, color=color, linewidth=1.5, label=f"q{k}{names.get(k, '')}")
            axes.legend()
            every = np.concatenate([curve for _, curve in quartiles.values()])
            _finish_curves(axes, every, key, "by quartile of the noise level")


def _annotate_end(axes: Axes, steps: np.ndarray, values: np.ndarray, color: str) -> None:
    style = {"textcoords": "offset points", "va": "center", "color": color}
    axes.annotate(f"{values[-1]:.3g}", (steps[-1], values[-1]), xytext=(5, 0), **style)


def _finish_curves(axes: Axes, values: np.ndarray, key: str, title: str) -> None:
    if len(values) and values.min() > 0 and values.max() > 4 * values.min():
        log_axis(axes, (1, 2, 5))
    axes.set(xlabel="step", ylabel=key, title=title)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(True)
    axes.set_axisbelow(True)


def log_axis(axes: Axes, digits: Sequence[float]) -> None:
    """Makes the y-axis logarithmic, with numbers at these digits of each decade."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())


def trajectory_strip(
    path: str | Path,
    xs: np.ndarray,
    *,
    columns: int = 10,
    scale: int | None = None,
    row_names: Sequence[str] = (),
) -> None:
    """A row per image, noise on the left, clean on the right: xs [S, N, H, W, C] into a PNG.

    Shows ``columns`` of the S states, evenly spread, first and last included.
    """
    xs = _check_trajectory(xs, 5)
    shown = xs[np.unique(np.round(np.linspace(0, len(xs) - 1, columns)).astype(int))]
    rows = shown.swapaxes(0, 1).reshape(-1, *xs.shape[2:])  # [N * columns, H, W, C]
    save_png(path, image_grid(rows, len(shown), scale=scale, row_names=row_names))


def trajectory_gif(
    path: str | Path,
    xs: np.ndarray,
    *,
    columns: int | None = None,
    scale: int | None = None,
    milliseconds: int = 80,
    hold: int = 1500,
) -> None:
    """An endless animation with one frame per state: xs [S, N, H, W, C] in [-1, 1] into a GIF.

    Each frame is a grid of the N images; the last one is held for ``hold`` milliseconds.
    """
    xs = _check_trajectory(xs, 5)
    frames = [Image.fromarray(image_grid(x, columns, scale=scale)) for x in xs]
    # One palette for all frames, else colours flicker.
    palette = Image.fromarray(np.concatenate([np.asarray(f) for f in frames])).quantize(256)
    frames = [f.quantize(palette=palette, dither=Image.Dither.NONE) for f in frames]
    times = [milliseconds] * (len(frames) - 1) + [hold]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=times, loop=0)


def density_figure(path: str | Path, samples: np.ndarray, data: np.ndarray | None = None) -> None:
    """Points [N, 2] as a density, beside those of the data [M, 2] where there are any: a PNG."""
    panels = {"samples": samples} if data is None else {"data": data, "samples": samples}
    limit = 1.15 * float(np.abs(next(iter(panels.values()))).max())
    with new_figure(path, 3.7 * len(panels), 4.0) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for ax, (name, points) in zip(axes, panels.items()):
            box = (-limit, limit, -limit, limit)
            ax.hexbin(*points.T, gridsize=60, extent=box, cmap="Blues", mincnt=1, linewidths=0.1)
            _square(ax, limit, f"{name} (n = {len(points):,})")


def path_figure(path: str | Path, xs: np.ndarray, *, lines: int = 200) -> None:
    """The ways xs [S, K, 2] of the first ``lines`` points from noise to data, into a PNG."""
    xs = _check_trajectory(xs, 3)[:, :lines]
    # Noise of a large sigma lies far outside: show the greater part of it, at most thrice the data.
    limit, reach = 1.15 * np.abs(xs[-1]).max(), 1.1 * np.quantile(np.abs(xs[0]).max(-1), 0.9)
    with new_figure(path, 4.4, 4.4) as figure:
        ax = figure.subplots()
        for line in xs.swapaxes(0, 1):
            ax.plot(*line.T, color=GRAY, linewidth=0.5, alpha=0.5)
        ax.scatter(*xs[0].T, s=6, color=ORANGE, label="noise", zorder=2, linewidths=0)
        ax.scatter(*xs[-1].T, s=6, color=BLUE, label="sample", zorder=3, linewidths=0)
        _square(ax, np.clip(reach, limit, 3 * limit), f"trajectories (n = {xs.shape[1]:,})")
        ax.legend(loc="upper right", handletextpad=0.2, frameon=True, framealpha=0.9, markerscale=2)


def _square(ax: Axes, limit: float, title: str) -> None:
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal", title=title)
    ax.set(xlabel="$x_1$", ylabel="$x_2$")
    ax.locator_params(nbins=5)


def _check_trajectory(xs: np.ndarray, ndim: int) -> np.ndarray:
    xs = np.asarray(xs)
    if xs.ndim != ndim or len(xs) == 0:
        shape = "[S, N, H, W, C]" if ndim == 5 else "[S, K, 2]"
        raise ValueError(f"expected a trajectory {shape}, got {xs.shape}")
    return xs


@contextmanager
def new_figure(path: str | Path, width: float, height: float) -> Iterator[Figure]:
    """A figure in the common style, written to ``path``; free of pyplot's global state."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor=PAPER)
        FigureCanvasAgg(figure)
        yield figure
        figure.savefig(path, format="png")
