"""A comparison of results as a table in Markdown and as a picture."""

from __future__ import annotations

import string
from collections.abc import Mapping, Sequence
from itertools import count as counting
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from diffusion.evaluation import merits
from diffusion.evaluation.figures import BLUE, GRAY, INK, MUTED, ORANGE, new_figure

ARROWS = {merits.HIGHER: " ↑", merits.LOWER: " ↓", merits.NEITHER: ""}
LIKE = "≈"
COLUMNS = 3
CAPTION = (
    "bars: standard deviation over seeds, or 95 % interval; orange: best; grey: not comparable"
)
LONGEST = 40  # characters of a row's name in a picture


def markdown(compared: Mapping[str, Any]) -> str:
    """The table of ``comparison.compare``, and what its marks mean."""
    columns, rows, fields = compared["figures"], compared["rows"], compared["fields"]
    letters = _letters(rows)
    head = [*(fields or ["setting"]), "seeds"]
    head += [about["label"] + ARROWS[about["better"]] for about in columns.values()]
    lines = [_line(head), "|" + "---|" * len(head)]
    for row in rows:
        cells = [_shown(name, row["figures"][name], letters) for name in columns]
        lines.append(_line([*(row["setting"] or ["all"]), str(row["seeds"]), *cells]))
    if any(about["real"] is not None for about in columns.values()):
        reals = [
            "" if about["real"] is None else merits.shown(name, about["real"])
            for name, about in columns.items()
        ]
        lines.append(_line(["real data", *[""] * (len(head) - 1 - len(reals)), *reals]))
    return "\n".join([*lines, "", *(f"- {note}" for note in legend(compared))]) + "\n"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _remarks(cell: Mapping[str, Any]) -> list[str]:
    """What has to be said of a cell."""
    found = [cell["note"]] if cell["note"] else []
    return found + [f"another result of this row is left out: {text}" for text in cell["left_out"]]


def _letters(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """A letter for each remark, in the order of the cells; beyond z two letters."""
    remarks = [
        text for row in rows for cell in row["figures"].values() if cell for text in _remarks(cell)
    ]
    names = (
        string.ascii_lowercase[i % 26] * (i // 26 + 1) for i in counting()
    )  # a ... z, aa ... zz
    return dict(zip(dict.fromkeys(remarks), names))


def _shown(name: str, cell: Mapping[str, Any] | None, letters: Mapping[str, str]) -> str:
    if cell is None:
        return ""
    finite = np.isfinite(cell["values"]).all()
    text = merits.shown(name, cell["mean"], cell["spread"]) if finite else "not finite"
    text = f"**{text}**" if cell["best"] else text
    text = f"{text} {LIKE}" if cell["like_best"] else text
    marks = ", ".join(letters[remark] for remark in _remarks(cell))
    return f"{text} ({marks})" if marks else text


def legend(compared: Mapping[str, Any]) -> list[str]:
    """What the marks of the table mean, and what it does not claim."""
    columns, rows = compared["figures"], compared["rows"]
    cells = [(name, c) for row in rows for name, c in row["figures"].items() if c]
    numbers = sorted({len(c["values"]) for _, c in cells})
    notes = []
    if numbers[-1] > 1:
        notes.append(f"With several seeds ({_range(numbers)}), ± is their standard deviation.")
    if any(len(c["values"]) == 1 and c["half"] is not None for _, c in cells):
        notes.append("With one seed, ± is half the width of the figure's 95 % interval.")
    if any(c["best"] for _, c in cells):
        notes.append("Bold is the best value of those that may be compared.")
    tests = sorted({test for about in columns.values() for test in about["tests"]})
    if tests:
        tested = sorted({len(c["values"]) for _, c in cells if c["best"] or c["test"]})
        notes.append(
            f"{LIKE}: not significantly different from the best at 5 %, by {' or '.join(tests)} "
            f"({_range(tested)} seed{'s' * (tested[-1] > 1)} a row), corrected for the number of "
            "rows by Holm's method. Tested rows without a mark are significantly worse."
        )
    for name, about in columns.items():
        own = [row["figures"][name] for row in rows if row["figures"][name]]
        # The best row has no test of its own.
        lacking = [c for c in own if not c["note"] and not c["best"] and c["test"] is None]
        if any(c["best"] for c in own) and lacking:
            notes.append(
                f"{about['label']}: {len(lacking)} of {len(own)} rows could not be tested against "
                "the best (that takes two seeds of both, or an interval of both); nothing is "
                "claimed of these."
            )
    return notes + [f"{letter}: {text}." for text, letter in _letters(rows).items()]


def _range(numbers: Sequence[int]) -> str:
    low, high = numbers[0], numbers[-1]
    return str(low) if low == high else f"{low} to {high}"


def picture(path: str | Path, compared: Mapping[str, Any]) -> None:
    """One panel per figure: a dot for each row, small ones for its seeds, and the spread.

    Dotted: real data. Grey: rows that may not be compared with the others. Writes a PNG.
    """
    columns, rows = compared["figures"], compared["rows"]
    across = min(len(columns), COLUMNS)
    down = -(-len(columns) // across)
    names = [_name(row["setting"]) for row in rows]
    margin = 0.075 * max(map(len, names)) + 0.3
    height = down * (0.3 * len(rows) + 1.1) + 0.3
    with new_figure(path, max(2.7 * across + margin, 5.0), max(height, 2.2)) as canvas:
        axes = list(canvas.subplots(down, across, squeeze=False, sharey=True).flat)
        axes[0].set_yticks(range(len(rows)), names)
        axes[0].set_ylim(len(rows) - 0.2, -0.6)
        for ax, (name, about) in zip(axes, columns.items()):
            _panel(ax, name, about, [row["figures"][name] for row in rows])
        for ax in axes[len(columns) :]:
            ax.set_visible(False)
        canvas.supxlabel(CAPTION, fontsize=8, color=MUTED)


def _name(setting: Sequence[str]) -> str:
    text = ", ".join(setting) or "all"
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}…"


def _panel(
    ax: Axes, name: str, about: Mapping[str, Any], cells: Sequence[Mapping[str, Any] | None]
) -> None:
    factor = 100 if merits.merit(name).percent else 1
    for y, cell in enumerate(cells):
        if cell is None or not np.isfinite(cell["values"]).all():
            continue
        color = GRAY if cell["note"] else ORANGE if cell["best"] else BLUE
        x, spread = factor * cell["mean"], factor * (cell["spread"] or 0)
        if len(cell["values"]) > 1:
            seeds = factor * np.asarray(cell["values"])
            ax.scatter(seeds, np.full(len(seeds), y + 0.22), s=7, color=color, alpha=0.6, lw=0)
        ax.errorbar(x, y, xerr=spread or None, fmt="o", color=color, ms=5, lw=1.4, capsize=2.5)
    if about["real"] is not None:
        ax.axvline(factor * about["real"], color=INK, linewidth=1, linestyle=":", zorder=1)
        place = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points"}
        right = factor * about["real"] > np.mean(ax.get_xlim())
        style = {"ha": "right" if right else "left", "va": "bottom", "fontsize": 7.5}
        at, shift = (factor * about["real"], 0), (-3 if right else 3, 1)
        ax.annotate("real data", at, xytext=shift, color=MUTED, **place, **style)
    ax.set_title(about["label"] + ARROWS[about["better"]], fontsize=10)
    ax.locator_params(axis="x", nbins=5)
    ax.grid(True, axis="x")
    ax.tick_params(axis="y", length=0)
    ax.set_axisbelow(True)
