"""Results of several runs side by side: which is best, by how much, and whether that is chance."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffusion.evaluation import merits, provenance, significance
from diffusion.evaluation.intervals import Z95
from diffusion.evaluation.provenance import Basis
from diffusion.specs import unknown

MOST = 6
"""Figures that are shown where none are named."""
WITHOUT = ("sampler", "samples", "evaluation", "sweep", "learn", "inspect", "profile", "log")
WITHOUT += ("compare", "reference", "parallel")
"""Sections of a config that say nothing of the model; those of an evaluation are in its own
settings."""
IDLE = ("evaluation.metrics", "evaluation.features", "evaluation.shard", "evaluation.reference")
IDLE += ("data.threads", "data.workers", "data.prefetch")
"""Settings that make no row of their own: what figures depend on of these is in their
provenance."""
WELCH, BY_INTERVALS = "Welch's t-test over seeds", "a z-test by the 95 % intervals"


class Result(NamedTuple):
    """One evaluation.

    Attributes:
      place: its folder.
      seed, sampler_seed: of training and of sampling; None where there is none.
      settings: of the model and of the evaluation, by dotted names, without seeds.
      figures: by name, nested ones by dotted names.
      bases: name of a figure -> what it depends on.
    """

    place: str
    seed: Any
    sampler_seed: Any
    settings: dict[str, Any]
    figures: dict[str, float]
    bases: dict[str, Basis]

    def basis(self, figure: str) -> Basis | None:
        """What a figure depends on; None if it is not known."""
        return self.bases.get(figure, self.bases.get(figure.partition(".")[0]))


class Cell(NamedTuple):
    """A figure of one row.

    Attributes:
      values: one per seed.
      half: half the width of the 95 % interval of the one value, if it is known.
      basis: what all values depend on; None: not known.
      left_out: bases of other results of the row, which are not among the values.
      real: the figure of real data.
    """

    values: tuple[float, ...]
    half: float | None
    basis: Basis | None
    left_out: tuple[Basis | None, ...]
    real: float | None

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))

    @property
    def spread(self) -> float | None:
        """The standard deviation over seeds, or half the interval of one value."""
        return float(np.std(self.values, ddof=1)) if len(self.values) > 1 else self.half


def result(place: str, config: Mapping[str, Any], evaluation: Mapping[str, Any]) -> Result:
    """An evaluation.json as it is compared, with the config of its run ({} if there is none)."""
    judged = flat(evaluation.get("settings", {}))
    # Samples of a file are no samples of the run in whose folder they were judged.
    config = {} if "samples.path" in judged else config
    kept = {name: value for name, value in config.items() if name not in WITHOUT}
    model = kept.get("model", {})
    if model.get("name") in model:  # without the fields of networks that are not used
        kept["model"] = {"name": model["name"], model["name"]: model[model["name"]]}
    settings = flat(kept) | judged
    seeds = settings.pop("seed", None), settings.pop("sampler.seed", None)
    for name in IDLE:
        settings.pop(name, None)
    measured = {k: v for k, v in evaluation.items() if k not in ("settings", "provenance")}
    bases = {}
    for spec, about in evaluation.get("provenance", {}).items():
        bases |= dict.fromkeys(about["figures"], provenance.basis(spec, about))
    return Result(place, *seeds, settings, merits.figures(measured), bases)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    found = {}
    for name, value in config.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return found


def compare(results: Sequence[Result], figures: Iterable[str] = ()) -> dict[str, Any]:
    """A row for each setting, a column for each figure; all of it as JSON has it.

    In a column, rows whose figures depend on the same conditions as most results of it are
    compared. The one with the best mean is tested against each other one, and the p-values are
    corrected for their number by Holm's method. A row that is truly as good as all others is
    thereby called worse in 5 % of tables at most (as in Hsu, 1981, multiple comparisons with the
    best).

    Args:
      results: of ``result``.
      figures: names; by default those that all rows share, the main ones first, at most ``MOST``.

    Returns:
      fields: the settings in which results differ. figures: by name label, better ("higher",
      "lower", ""), real, basis and tests (their names). rows: setting, places, seeds, and figures,
      by name values, mean, spread, half, real, note (why it stands apart, or ""), left_out, best,
      test, p, p_holm and like_best (None if not tested).

    Raises:
      ValueError: a figure is unknown, or none is shared.
    """
    fields, rows = _rows(results)
    names = _chosen([own for _, own in rows], tuple(figures))
    columns = {name: _column(name, [own for _, own in rows]) for name in names}
    return {
        "fields": fields,
        "figures": {name: about for name, (about, _) in columns.items()},
        "rows": [
            {
                "setting": setting,
                "places": sorted({r.place for r in own}),
                "seeds": max((len(c[i]["values"]) for _, c in columns.values() if c[i]), default=0),
                "figures": {name: cells[i] for name, (_, cells) in columns.items()},
            }
            for i, (setting, own) in enumerate(rows)
        ],
    }


def _rows(results: Sequence[Result]) -> tuple[list[str], list[tuple[list[str], list[Result]]]]:
    """The fields that tell settings apart, and the results of each setting."""
    names = sorted(set().union(*(r.settings for r in results)))
    shared = [n for n in names if all(n in r.settings for r in results)]

    def key(own: Result, fields: Iterable[str]) -> tuple[str, ...]:
        return tuple(_cell_text(own.settings.get(n, "–")) for n in fields)

    groups = defaultdict(list)
    for own in results:
        groups[key(own, names)].append(own)
    first = [group[0] for group in groups.values()]
    fields = [n for n in shared if len({key(own, [n]) for own in first}) > 1]
    # A field that some lack belongs to their model; it is shown where nothing else tells it.
    for name in [n for n in names if n not in shared]:
        told = len({key(own, fields) for own in first})
        if told < len(first) and len({key(own, [*fields, name]) for own in first}) > told:
            fields.append(name)
    rows = [(list(key(group[0], fields)), group) for group in groups.values()]
    return fields, sorted(rows, key=lambda row: [_order(text) for text in row[0]])


def _cell_text(value: Any) -> str:
    return value or "–" if isinstance(value, str) else json.dumps(value, default=str).strip('"')


def _order(text: str) -> tuple[int, float, str]:
    try:
        return (0, float(text), "")
    except ValueError:
        return (1, 0.0, text)


def _chosen(rows: Sequence[Sequence[Result]], given: Sequence[str]) -> list[str]:
    """The names of the figures to show."""
    own = [set().union(*(r.figures for r in row)) for row in rows]
    known = set().union(*own)
    for name in given:
        if name not in known:
            raise unknown("config.compare.figures", name, merits.main(known))
    found = list(dict.fromkeys(given)) or merits.main(set.intersection(*own))[:MOST]
    if not found:
        raise ValueError(
            "no figure is in all results; choose config.compare.figures of "
            + ", ".join(merits.main(known))
        )
    return found


def _column(
    name: str, rows: Sequence[Sequence[Result]]
) -> tuple[dict[str, Any], list[dict[str, Any] | None]]:
    """What is said of a figure, and its cells."""
    bases = [r.basis(name) for row in rows for r in row if name in r.figures]
    most = Counter(json.dumps(b, sort_keys=True) for b in bases if b is not None).most_common(1)
    common = json.loads(most[0][0]) if most else None
    cells = [_cell(name, row, common) for row in rows]
    notes = [provenance.difference(c.basis, common) if c else "" for c in cells]
    better = merits.merit(name).better
    finite = [bool(c) and bool(np.isfinite(c.values).all()) for c in cells]
    able = [i for i, c in enumerate(cells) if c and not notes[i] and finite[i]]
    found = _tested(better, {i: cells[i] for i in able}) if better and len(able) > 1 else {}
    real = [c.real for i, c in enumerate(cells) if c and c.real is not None and not notes[i]]
    about = {
        "label": merits.title(name),
        "better": better,
        "real": float(np.mean(real)) if real else None,
        "basis": common,
        "tests": sorted({t["test"] for t in found.values() if t["test"]}),
    }
    none = {"best": False, "test": None, "p": None, "p_holm": None, "like_best": None}
    made = [
        c
        and {
            "values": list(c.values),
            "mean": c.mean,
            "spread": c.spread,
            "half": c.half,
            "real": c.real,
            "note": notes[i],
            "left_out": [provenance.difference(b, c.basis) for b in c.left_out],
            **found.get(i, none),
        }
        for i, c in enumerate(cells)
    ]
    return about, made


def _cell(name: str, row: Sequence[Result], common: Basis | None) -> Cell | None:
    """A figure of one row, of the results that depend on the same."""
    by = {}  # the same evaluation once more counts once
    for own in row:
        if name in own.figures:
            text = json.dumps(own.basis(name), sort_keys=True)
            by[own.seed, own.sampler_seed, text] = own
    if not by:
        return None
    texts = Counter(text for *_, text in by)
    wanted = json.dumps(common, sort_keys=True)
    chosen = wanted if wanted in texts else texts.most_common(1)[0][0]
    kept = [own for (*_, text), own in by.items() if text == chosen]
    # Seeds of training count where they vary; of one model, those of sampling.
    trained = len({own.seed for own in kept}) > 1
    units = defaultdict(list)
    for own in kept:
        units[own.seed if trained else own.sampler_seed].append(own.figures[name])
    values = tuple(float(np.mean(units[unit])) for unit in sorted(units, key=str))
    half, real = None, [own.figures.get(merits.beside(name, "_real")) for own in kept]
    if len(kept) == 1:
        half = _half(kept[0].figures, name)
    real = [value for value in real if value is not None]
    return Cell(
        values,
        half,
        json.loads(chosen),
        tuple(json.loads(text) for *_, text in by if text != chosen),
        float(np.mean(real)) if real else None,
    )


def _half(figures: Mapping[str, float], name: str) -> float | None:
    """Half the width of a figure's 95 % interval."""
    folder, dot, _ = name.rpartition(".")
    half = figures.get(merits.beside(name, "_ci"))
    if half is None and name.endswith("bits_per_dim"):
        half = Z95 * figures.get(f"{folder}{dot}standard_error", math.nan)
    return half if half is not None and math.isfinite(half) else None


def _tested(better: str, cells: Mapping[int, Cell]) -> dict[int, dict[str, Any]]:
    """The best of the cells, and the p-values of all others against it, by row."""
    sign = 1 if better == merits.HIGHER else -1
    best = max(cells, key=lambda i: sign * cells[i].mean)
    tested = {i: _test(cells[best], cells[i]) for i in cells if i != best}
    counted = [i for i, (test, _) in tested.items() if test]
    corrected = dict(zip(counted, significance.holm([tested[i][1] for i in counted])))
    found = {best: {"best": True, "test": None, "p": None, "p_holm": None, "like_best": None}}
    for i, (test, p) in tested.items():
        p_holm = corrected.get(i)
        like = None if p_holm is None else p_holm >= significance.LEVEL
        found[i] = {"best": False, "test": test, "p": p, "p_holm": p_holm, "like_best": like}
    return found


def _test(a: Cell, b: Cell) -> tuple[str | None, float | None]:
    """The name and the p-value of the test of equal means that two cells allow."""
    if min(len(a.values), len(b.values)) > 1:
        return WELCH, significance.welch(a.values, b.values)
    if len(a.values) == len(b.values) == 1 and None not in (a.half, b.half):
        return BY_INTERVALS, significance.by_intervals(a.mean, b.mean, a.half, b.half)
    return None, None
