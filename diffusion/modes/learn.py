"""--mode=learn: few-step solvers learned for a model, beside the best fixed ones."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from ml_collections import ConfigDict

from diffusion.config import drawing
from diffusion.config.drawing import Drawing
from diffusion.evaluation import convergence
from diffusion.evaluation.figures import BLUE, GRAY, ORANGE, new_figure
from diffusion.pipelines import draw
from diffusion.sampling.solvers.table_file import save
from diffusion.sampling.student import Learned, Lessons, Student, coefficients
from diffusion.sampling.tables import Solver
from diffusion.schedules import Schedule


def run(config: ConfigDict, workdir: str) -> None:
    """Learns a table for each number of evaluations in ``config.learn``.

    Leaves in ``workdir`` learned_N.npz, for ``--config.sampler.solver="from_file(path='...')"``,
    and learned.json, learned.md and learned.png: the distance to the teacher's samples, on held-out
    noise, beside that of every fixed solver and grid in the config.
    """
    _check(config)
    c, folder, bar = config.learn, Path(workdir), sys.stderr.isatty()
    model = drawing.opened(config, workdir)
    drawer, pipeline = model.drawer, model.pipeline
    if drawer.acceleration.remembers:
        raise ValueError(
            f"config.sampler.acceleration={config.sampler.acceleration!r}: solvers are learned "
            "from whole evaluations"
        )
    if getattr(pipeline.image_network, "two_times", False):
        raise ValueError(
            f"{model.opened.name}: the network is told where it aims, and knows few steps already; "
            "solvers are learned for denoisers"
        )
    teacher = model.table(c.teacher, config.sampler.grid, c.teacher_steps, "config.learn.teacher")
    if not convergence.deterministic(teacher):
        raise ValueError(f"config.learn.teacher={c.teacher!r} must be a deterministic solver")
    fixed = {n: _fixed(model, n) for n in c.evaluations}

    program = draw.program(pipeline, drawer.sampler, drawer.companions)
    total = c.count + c.held_out + c.test
    cond = drawer.conditioning(model.params, model.subjects(total), model.negative)
    student = Student(
        lambda weights, cond: program.guided(weights, *cond, drawer.chain),
        draw.weights(pipeline, model.params, teacher, drawer.companions),
    )
    print(f"{total} samples of {c.teacher} with {teacher.evaluations} evaluations")
    lessons = student.lessons(
        teacher,
        cond,
        total,
        pipeline.shape,
        batch_size=c.batch_size,
        seed=config.sampler.seed,
        progress=bar,
    )
    lessons, rest = lessons.split(c.count)
    held_out, test = rest.split(c.held_out)
    folder.mkdir(parents=True, exist_ok=True)
    settings, rows = drawing.settings(model.config, pipeline, model.step), []
    for n, tables in fixed.items():
        row, result = _learn_one(model, student, n, tables, (lessons, held_out, test), bar)
        save(str(folder / f"learned_{n}.npz"), result.solver)
        rows.append(row)
        print(_line(row))
        report = {"settings": settings, "learn": c.to_dict(), "rows": rows}
        (folder / "learned.json").write_text(json.dumps(report, indent=2) + "\n")
    (folder / "learned.md").write_text(_markdown(rows, config))
    _figure(folder / "learned.png", rows)
    print(f"tables, learned.png, learned.md and learned.json in {folder}")


def _learn_one(
    model: Drawing,
    student: Student,
    n: int,
    tables: dict[tuple[str, str], Solver],
    lessons: tuple[Lessons, Lessons, Lessons],
    bar: bool,
) -> tuple[dict[str, Any], Learned]:
    c, schedule = model.config.learn, model.pipeline.schedule
    train, held_out, test = lessons
    errors = {
        name: student.error(convergence.fill(table, n), held_out, c.batch_size)
        for name, table in tables.items()
    }
    ranked = sorted(errors, key=errors.get)
    start = next(name for name in ranked if _can_start(tables[name], n, schedule))
    result = student.learn(
        schedule,
        tables[start],
        train,
        held_out,
        batch_size=c.batch_size,
        iterations=c.iterations,
        learning_rate=c.learning_rate,
        progress=bar,
    )
    best = ranked[0]
    row = {
        "evaluations": n,
        "learned": student.error(result.solver, test, c.batch_size),
        "best_fixed": student.error(convergence.fill(tables[best], n), test, c.batch_size),
        "best_fixed_solver": " on ".join(best),
        "start": " on ".join(start),
        "fixed": {" on ".join(name): errors[name] for name in ranked},
        "times": [float(t) for t in result.solver.level.t],
        "history": result.history,
    }
    return row, result


def _fixed(model: Drawing, n: int) -> dict[tuple[str, str], Solver]:
    """Tables of at most n evaluations of every solver on every grid to compare with."""
    c, tables = model.config.learn, {}
    for solver in c.against:
        for grid in c.grids:
            try:
                _, table = convergence.most_steps(
                    lambda s, steps, grid=grid: model.table(s, grid, steps, "config.learn.against"),
                    solver,
                    n,
                )
            except ValueError as error:
                if "unknown" in str(error):
                    raise
                continue  # too few evaluations for it
            if not convergence.deterministic(table):
                raise ValueError(f"config.learn.against: {solver!r} must be deterministic")
            tables[solver, grid] = table
    if not any(_can_start(table, n, model.pipeline.schedule) for table in tables.values()):
        raise ValueError(
            "config.learn.against needs ddim, dpmpp_2m or dpmpp_3m, from which learning starts"
        )
    return tables


def _can_start(table: Solver, n: int, schedule: Schedule) -> bool:
    try:
        coefficients(table, schedule)
    except ValueError:
        return False
    return table.evaluations == n


def _check(config: ConfigDict) -> None:
    c = config.learn
    if c.batch_size > c.count:
        raise ValueError(f"config.learn.batch_size={c.batch_size} is more than count={c.count}")
    wrong = [n for n in c.evaluations if not isinstance(n, int) or isinstance(n, bool) or n < 1]
    if wrong or not c.evaluations:
        raise ValueError(
            f"config.learn.evaluations must be whole numbers >= 1, got {c.evaluations}"
        )
    if config.sampler.corrector:
        raise ValueError(
            "config.sampler.corrector draws noise, and a teacher must be deterministic"
        )


def _line(row: dict[str, Any]) -> str:
    return (
        "{evaluations} evaluations: {learned:.4f} learned, {best_fixed:.4f} {best_fixed_solver} "
        "(distance to the teacher)".format(**row)
    )


def _markdown(rows: list[dict[str, Any]], config: ConfigDict) -> str:
    c = config.learn
    lines = [
        "# Learned few-step solvers",
        "",
        f"Root mean square distance to the samples of {c.teacher} with {c.teacher_steps} steps, "
        f"over {c.test} samples from noise neither learned from nor chosen by; guidance "
        f"{config.sampler.guidance!r}.",
        "",
        "| evaluations | learned | best fixed | which | learned from |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            "| {evaluations} | {learned:.4f} | {best_fixed:.4f} | {best_fixed_solver} | "
            "{start} |".format(**row)
        )
    return "\n".join(lines) + "\n"


def _figure(path: Path, rows: list[dict[str, Any]]) -> None:
    n = [row["evaluations"] for row in rows]
    with new_figure(path, 6.0, 4.0) as figure:
        ax = figure.subplots()
        for row in rows:
            values = list(row["fixed"].values())
            label = "each fixed solver and grid" if row is rows[0] else None
            ax.plot([row["evaluations"]] * len(values), values, "_", color=GRAY, label=label)
        ax.plot(n, [row["best_fixed"] for row in rows], "s-", color=ORANGE, label="best fixed")
        ax.plot(n, [row["learned"] for row in rows], "o-", color=BLUE, label="learned")
        ax.set(yscale="log", xlabel="evaluations", ylabel="distance to the teacher (RMS)", xticks=n)
        low, high = (
            f(v for row in rows for v in (row["learned"], row["best_fixed"])) for f in (min, max)
        )
        ax.set_ylim(low / 1.5, 12 * high)  # the worst solvers are far beyond
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
        ax.legend()
