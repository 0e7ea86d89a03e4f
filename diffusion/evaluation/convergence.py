"""Quality against the number of evaluations, solver by solver: the figure of every sampler paper.

Budgets are evaluations of the denoiser, which are what sampling costs; a solver of two stages takes
half as many steps. Every solver takes the most steps that its budget allows.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from diffusion.evaluation import merits
from diffusion.evaluation.figures import GRAY, MUTED, log_axis, new_figure
from diffusion.sampling.tables import Solver

COLORS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626")
COLORS += ("#0891b2", "#a16207", "#db2777", "#4b5563", "#65a30d")
MARKERS = "osD^vP*Xph"
PANELS, COLUMNS = 6, 3
"""Measures in a picture, and how many of them stand side by side."""

Make = Callable[[str, int], Solver]  # (solver as in a config, steps) -> table
Row = dict[str, Any]


class Entry(NamedTuple):
    """One point to measure: a solver's table of at most ``budget`` evaluations.

    ``model`` says which of several models it is for; the first one's name is empty.
    """

    solver: str
    steps: int
    table: Solver
    budget: int
    model: str = ""

    @property
    def name(self) -> str:
        """Of the line that the point is on."""
        return f"{self.model}: {self.solver}" if self.model else self.solver


class Measure(NamedTuple):
    """A figure of merit: its key in a row, its name, its axis, and what it is compared with."""

    key: str
    name: str
    log: bool
    real: float | None
    beside: str


def plan(
    make: Make, solvers: Sequence[str], budgets: Sequence[int], model: str = ""
) -> tuple[list[Entry], list[str]]:
    """Each solver at each budget, with the most steps that it allows.

    Budgets at which a solver comes to the table of a smaller one are left out. Returns the entries,
    and a line for each budget that is too small for a solver.
    """
    entries, notes = [], []
    for solver in dict.fromkeys(solvers):
        make(solver, max(budgets))  # a mistake in its name or options is not one of the budget
        known = set()
        for budget in sorted(set(budgets)):
            try:
                steps, table = most_steps(make, solver, budget)
            except ValueError as error:
                notes.append(f"{solver} is left out at {budget} evaluations: {error}")
                continue
            if steps not in known:
                entries.append(Entry(solver, steps, table, budget, model))
            known.add(steps)
    if not entries:
        raise ValueError("no solver is possible with these evaluations:\n" + "\n".join(notes))
    return entries, notes


def most_steps(make: Make, solver: str, budget: int) -> tuple[int, Solver]:
    """The largest number of steps with at most ``budget`` evaluations, and its table."""
    steps, table = budget, make(solver, budget)
    while table.evaluations > budget:
        if steps == 1:
            raise ValueError(f"one step takes {table.evaluations}")
        steps = max(1, min(steps - 1, steps * budget // table.evaluations))
        table = make(solver, steps)
    while steps < budget and (longer := make(solver, steps + 1)).evaluations <= budget:
        steps, table = steps + 1, longer
    return steps, table


def fill(table: Solver, evaluations: int) -> Solver:
    """The same sampler with idle rows at its end, which change nothing: tables of one size share
    one compilation."""
    more = evaluations - table.evaluations
    if more < 0:
        raise ValueError(f"the table has {table.evaluations} evaluations, more than {evaluations}")
    idle = jax.tree.map(lambda a: np.repeat(a[-1:], more, axis=0), table._replace(init=np.zeros(1)))
    idle = idle._replace(
        A=np.broadcast_to(np.eye(table.A.shape[-1]), idle.A.shape),
        **{name: np.zeros_like(idle.b) for name in ("b", "b_raw", "noise", "noise_upper")},
    )
    longer = jax.tree.map(lambda a, b: np.concatenate([np.atleast_1d(a), b]), table, idle)
    return longer._replace(init=table.init)


def deterministic(table: Solver) -> bool:
    """Whether the end is a function of the initial noise alone."""
    return not (np.any(table.noise) or np.any(table.noise_upper))


def rmse(x: np.ndarray, y: np.ndarray) -> float:
    """Root mean squared difference over everything."""
    return float(np.sqrt(np.mean((np.asarray(x, np.float64) - y) ** 2)))


def run(
    path: Path,
    settings: Mapping[str, Any],
    entries: Sequence[Entry],
    seeds: Sequence[int],
    draw: Callable[[Entry, Solver, int], np.ndarray],
    judge: Callable[[np.ndarray], Mapping[str, float]],
    reference: Callable[[int], tuple[np.ndarray, float]],
    report: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Measures every entry by every seed, unless ``path`` has the result, and keeps all there.

    Args:
      path: sweep.json, rewritten after every point; one of other ``settings`` is started anew.
      settings: whatever else the results depend on; JSON.
      entries: of ``plan``.
      seeds: of the noise.
      draw: (entry, table, seed) -> samples [N, ...], image i from the i-th noise of the seed.
      judge: samples -> figures of merit, and those of real data under names ending in "_real".
      reference: seed -> the first M samples of the exact flow from the same noises, and their own
        error; called if it is needed.
      report: takes a line per point.

    Returns:
      settings, reference_errors (by seed), real (by measure) and rows: per entry and seed solver,
      seed, budget, steps, evaluations, deterministic, finite, rmse (None for stochastic solvers)
      and the judge's.
    """
    settings = json.loads(json.dumps(settings))
    result = json.loads(path.read_text()) if path.exists() else {}
    if result.get("settings") != settings:
        result = {"settings": settings, "reference_errors": {}, "real": {}, "rows": []}
    known = {(row["solver"], row["steps"], row["seed"]): row for row in result["rows"]}
    rows = []
    for seed, entry in itertools.product(seeds, entries):
        if entry is entries[0]:
            target = None  # of another seed
        row = known.get((entry.name, entry.steps, seed))
        if row is None:
            if target is None and deterministic(entry.table):
                target, result["reference_errors"][str(seed)] = reference(seed)
            row = _measure(entry, seed, draw, judge, target)
            result["real"] |= row.pop("real")
            result["rows"].append(row)
            partial = path.with_suffix(".json.partial")
            partial.write_text(json.dumps(result, indent=2) + "\n")
            partial.replace(path)
        rows.append(row | {"budget": entry.budget})
        report(_line(row))
    return result | {"rows": rows}


def _measure(
    entry: Entry, seed: int, draw: Callable, judge: Callable, target: np.ndarray | None
) -> Row:
    began = time.perf_counter()
    x = draw(entry, fill(entry.table, entry.budget), seed)
    row = {
        "solver": entry.name,
        "seed": seed,
        "budget": entry.budget,
        "steps": entry.steps,
        "evaluations": entry.table.evaluations,
        "deterministic": deterministic(entry.table),
        "finite": bool(np.isfinite(x).all()),
        "rmse": None,
        "seconds": round(time.perf_counter() - began, 2),
        "real": {},
    }
    if row["finite"]:
        if row["deterministic"]:
            row["rmse"] = rmse(x[: len(target)], target)
        judged = judge(x)
        row["real"] = {k: v for k, v in judged.items() if k.endswith("_real")}
        row |= {k: v for k, v in judged.items() if k not in row["real"]}
    return row


def _line(row: Row) -> str:
    values = [f"{key} {row[key]:.3g}" for key in _keys([row])]
    text = f"{row['solver']}: {row['evaluations']} evaluations ({row['steps']} steps), "
    text += f"seed {row['seed']}: "
    return text + (", ".join(values) if row["finite"] else "not finite")


def _keys(rows: Sequence[Row]) -> list[str]:
    """The measures that some row has, the main ones first."""
    found = {key for row in rows for key in row if isinstance(row[key], float)}
    return merits.main(found - {"seconds"})


def _means(rows: Sequence[Row]) -> list[Row]:
    """One row of several seeds: means, and under "spread" standard deviations, by measure."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["solver"], row["budget"]), []).append(row)
    made = []
    for own in groups.values():
        values = {key: [r[key] for r in own if isinstance(r.get(key), float)] for key in _keys(own)}
        spread = {k: float(np.std(v, ddof=1)) for k, v in values.items() if len(v) > 1}
        means = {key: float(np.mean(v)) for key, v in values.items()}
        finite = all(row["finite"] for row in own)
        made.append(own[0] | means | {"spread": spread, "finite": finite})
    return made


def measures(result: Mapping[str, Any]) -> list[Measure]:
    """The measures that some row has."""
    found = []
    for key in _keys(result["rows"]):
        real, name = result["real"].get(f"{key}_real"), "real data"
        merit = merits.merit(key)
        if key == "rmse":
            errors = list(result["reference_errors"].values())
            real, name = float(np.mean(errors)) if errors else None, "the reference's own error"
        beside = "" if real is None else f"{name}: {merits.shown(key, real)}"
        found.append(Measure(key, merits.title(key), merit.log, real, beside))
    return found


def figure(path: str | Path, result: Mapping[str, Any], title: str, cost: str = "") -> None:
    """One panel for each of the first ``PANELS`` measures, one line per solver, into a PNG.

    Dashed: stochastic. Bars: the standard deviation over seeds.
    """
    shown, rows = measures(result)[:PANELS], _means(result["rows"])
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    across = max(1, min(len(shown), COLUMNS))
    down = max(1, -(-len(shown) // across))
    with new_figure(path, max(4.2 * across, 7.5), 0.8 + 3.8 * down) as canvas:
        axes = list(canvas.subplots(down, across, squeeze=False).flat)
        for ax in axes[len(shown) :]:
            ax.set_visible(False)
        for ax, measure in zip(axes, shown):
            for i, solver in enumerate(solvers):
                own = [r for r in rows if r["solver"] == solver and r["finite"]]
                own = [r for r in own if r.get(measure.key) is not None]
                own.sort(key=lambda row: row["evaluations"])
                if own:
                    x, y = zip(*((row["evaluations"], row[measure.key]) for row in own))
                    style = {"linestyle": "-" if own[0]["deterministic"] else "--", "label": solver}
                    style |= {"color": COLORS[i % len(COLORS)], "marker": MARKERS[i % len(MARKERS)]}
                    bars = [row["spread"].get(measure.key, 0) for row in own]
                    bars = bars if any(bars) else None
                    ax.errorbar(x, y, bars, ms=4, lw=1.5, alpha=0.9, capsize=2, **style)
            _finish(ax, measure, [row["evaluations"] for row in rows], cost)
        handles = {}
        for ax in axes:
            handles |= {name: line for line, name in zip(*ax.get_legend_handles_labels())}
        names = [solver for solver in solvers if solver in handles]
        lines = [handles[name] for name in names]
        canvas.legend(lines, names, loc="outside lower center", ncols=min(len(names), 6))
        canvas.suptitle(title)


def _finish(ax: Axes, measure: Measure, evaluations: Sequence[int], cost: str) -> None:
    ax.set_xscale("log")
    digits = (1, 2, 3, 4, 5, 6, 8, 10, 15)
    whole = {int(d * 10**e) for d in digits for e in range(len(str(max(evaluations))))}
    ax.xaxis.set_major_locator(FixedLocator(sorted(whole.intersection(evaluations))))
    ax.xaxis.set_major_formatter("{x:g}")
    ax.xaxis.set_minor_locator(NullLocator())
    if measure.log:
        log_axis(ax, (1, 1.5, 2, 3, 5, 7))
    if merits.merit(measure.key).percent:
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    if measure.real is not None and not (measure.log and measure.real <= 0):
        ax.axhline(measure.real, color=GRAY, linewidth=1, linestyle=":", zorder=1)
        place = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
        style = {"va": "bottom", "fontsize": 8, "color": MUTED}
        ax.annotate(measure.beside, (0, measure.real), xytext=(4, 2), **place, **style)
    ax.set(xlabel=f"evaluations{cost}", title=measure.name)
    ax.grid(True)
    ax.set_axisbelow(True)


def markdown(result: Mapping[str, Any], title: str, notes: Sequence[str] = ()) -> str:
    """A table per measure: a row per solver, a column per budget."""
    rows = _means(result["rows"])
    budgets = sorted({row["budget"] for row in rows})
    by = {(row["solver"], row["budget"]): row for row in rows}
    solvers = list(dict.fromkeys(row["solver"] for row in rows))
    lines = [f"# {title}", "", *(f"- {note}" for note in notes), ""]
    for measure in measures(result):
        beside = f" ({measure.beside})" if measure.beside else ""
        lines += [f"## {measure.name}{beside}", ""]
        lines += _table(solvers, budgets, lambda s, b, key=measure.key: _cell(by.get((s, b)), key))
    lines += ["## Steps (evaluations)", ""]
    steps = {place: f"{row['steps']} ({row['evaluations']})" for place, row in by.items()}
    lines += _table(solvers, budgets, lambda s, b: steps.get((s, b), ""))
    return "\n".join(lines)


def _table(solvers: Sequence[str], budgets: Sequence[int], cell: Callable) -> list[str]:
    head = ["evaluations ≤", *map(str, budgets)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for solver in solvers:
        lines.append("| " + " | ".join([solver, *(cell(solver, b) for b in budgets)]) + " |")
    return [*lines, ""]


def _cell(row: Row | None, key: str) -> str:
    if row is None:
        return ""
    if not row["finite"]:
        return "not finite"
    value = row.get(key)
    return "–" if value is None else merits.shown(key, value, row["spread"].get(key))
