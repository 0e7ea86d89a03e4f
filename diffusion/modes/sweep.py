"""--mode=sweep: a model's quality against evaluations, solver by solver."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion.config import drawing, judging, results
from diffusion.config.drawing import Drawing
from diffusion.errors import field
from diffusion.evaluation import convergence, merits
from diffusion.evaluation.metrics.metric import of_array
from diffusion.pipelines import samplers
from diffusion.runs import workdir as workdirs
from diffusion.sampling.tables import Solver
from diffusion.specs import texts


def run(config: ConfigDict, workdir: str) -> None:
    """Judges ``config.sweep.solvers`` at ``config.sweep.evaluations``, all else being the config's.

    Beside them stand ``config.sweep.students``, other runs with the solvers that are their own, on
    the same noises: how few evaluations they need, and how near their teacher's flow they stay.
    Leaves in ``workdir/sweeps/HASH`` sweep.png, sweep.md and sweep.json, with the settings of which
    HASH is a hash. Each point is measured by each of ``config.sweep.seeds`` seeds; what is measured
    already is not measured again.
    """
    _check(config)
    c = config.sweep
    model = drawing.opened(config, workdir)
    drawer, pipeline = model.drawer, model.pipeline

    def make(solver: str, steps: int, name: str = "config.sweep.solvers") -> Solver:
        return model.table(solver, config.sampler.grid, steps, name)

    with field("config.sweep"):
        entries, notes = convergence.plan(make, c.solvers, c.evaluations)
    students = _students(config, workdir, pipeline.shape)
    for name, student in students.items():
        own = samplers.chosen_solver(student.pipeline, "auto")
        with field(f"config.sweep.students={c.students!r}"):
            more, noted = convergence.plan(partial(_own, student), [own], c.evaluations, name)
        entries, notes = [*entries, *more], [*notes, *noted]
    exact = make(c.reference, c.reference_steps, "config.sweep.reference")
    rough = make(c.reference, max(c.reference_steps // 2, 1), "config.sweep.reference")
    if not convergence.deterministic(exact):
        raise ValueError(f"config.sweep.reference={c.reference!r} must be a deterministic solver")
    for evaluations in {exact.evaluations, *(entry.budget for entry in entries)}:
        with field(f"config.sampler.acceleration={config.sampler.acceleration!r}"):
            drawer.acceleration.at(evaluations)  # its schedules may not fit them
    made = judging.make(config, pipeline, lambda: model.data)
    for note in notes:
        print(f"note: {note}")
    count = min(config.evaluation.count, drawer.batch_size)

    def draw(number: int, table: Solver, seed: int, name: str = "") -> np.ndarray:
        return students.get(name, model).samples(number, table, seed).draw(0, number)

    def reference(seed: int) -> tuple[np.ndarray, float]:
        print(f"the exact flow, by {c.reference} with {exact.evaluations} evaluations, seed {seed}")
        x = draw(count, exact, seed)
        other = draw(count, convergence.fill(rough, exact.evaluations), seed)
        return x, convergence.rmse(x, other)

    def quality(x: np.ndarray) -> dict[str, Any]:
        if not made.metrics:
            return {}
        drawn = of_array(x, model.samples(len(x)).subjects)
        figures = made.evaluate(drawn, model.params)
        return merits.figures({k: v for k, v in figures.items() if k != "provenance"})

    own = drawing.settings(config, pipeline, model.step)
    settings = results.judged(config, own, made)
    for name in ("solver", "steps", "seed"):
        settings["sampler"].pop(name)
    settings["parameters"] = judging.fingerprint(model.params)
    settings["reference"] = {k: c[k] for k in ("reference", "reference_steps")} | {"count": count}
    if students:
        settings["students"] = {
            name: {
                "parameters": judging.fingerprint(student.params),
                "sampler": drawing.settings(student.config, student.pipeline, student.step)[
                    "sampler"
                ],
            }
            for name, student in students.items()
        }
    folder = Path(workdir) / "sweeps" / workdirs.named(settings)
    folder.mkdir(parents=True, exist_ok=True)
    result = convergence.run(
        folder / "sweep.json",
        settings,
        entries,
        range(config.sampler.seed, config.sampler.seed + c.seeds),
        lambda entry, table, seed: draw(config.evaluation.count, table, seed, entry.model),
        quality,
        reference,
    )
    name = str(model.opened.name)
    title = f"{name}: quality against evaluations"
    notes = [*_facts(config, model.step, count, drawer.paired), *notes]
    (folder / "sweep.md").write_text(convergence.markdown(result, title, notes))
    cost = " (guided: two network calls each)" if drawer.paired else ""
    convergence.figure(folder / "sweep.png", result, title, cost)
    print(f"sweep.png, sweep.md and sweep.json in {folder}")


def _students(config: ConfigDict, workdir: str, shape: tuple[int, ...]) -> dict[str, Drawing]:
    """The runs of config.sweep.students by name, drawn from as they draw by themselves."""
    found: dict[str, Drawing] = {}
    for path in texts(config.sweep.students):
        own = ConfigDict(config.to_dict())
        with own.ignore_type():
            own.sampler.update(solver="auto", grid="auto", steps=0, guidance="auto")
            own.sampler.update(acceleration=(), corrector="")
        name = f"config.sweep.students={path!r}"
        source = drawing.open_model(own, path, name)
        if source.pipeline.shape != shape:
            raise ValueError(f"{name} draws {source.pipeline.shape}, this model {shape}")
        drawer, notes = drawing.drawer(own, source.pipeline)
        for note in notes:
            print(f"note: {path}: {note}")
        name = str(path) if source.name in found else source.name
        found[name] = Drawing(own, source, drawer, Path(workdir))
    return found


def _own(student: Drawing, solver: str, steps: int) -> Solver:
    return student.table(solver, "auto", steps, "its solver")


def _check(config: ConfigDict) -> None:
    c = config.sweep
    for name in ("solvers", "evaluations"):
        if not c[name]:
            raise ValueError(f"config.sweep.{name} is empty")
    wrong = [n for n in c.evaluations if not isinstance(n, int) or isinstance(n, bool) or n < 1]
    if wrong:
        raise ValueError(f"config.sweep.evaluations must be whole numbers >= 1, got {wrong[0]!r}")
    wrong = [name for name in c.solvers if not isinstance(name, str)]
    if wrong:
        raise ValueError(f"config.sweep.solvers must be names in quotes, got {wrong[0]!r}")
    if c.reference_steps < 2:
        raise ValueError(f"config.sweep.reference_steps must be >= 2, got {c.reference_steps}")
    if samplers.gives_levels(config.sampler.grid):
        raise ValueError(
            f"config.sampler.grid={config.sampler.grid!r} has the same steps at any number of "
            "evaluations; choose a grid without given levels"
        )


def _facts(config: ConfigDict, step: int, count: int, twice: bool) -> list[str]:
    s, c = config.sampler, config.sweep
    guided = "; guidance makes it two network calls, in one batch of twice the size"
    seeds = f", by each of {c.seeds} seeds (mean ± standard deviation)" if c.seeds > 1 else ""
    return [
        f"Averaged parameters after step {step}; {config.evaluation.count} samples a point{seeds}, "
        f"the same initial noises for all; grid {s.grid}, guidance {s.guidance!r}.",
        f"An evaluation is one call of the denoiser{guided if twice else ''}. Every solver takes "
        "the most steps that the budget allows; the last table has them.",
        f"Distance to the exact flow: root mean squared difference from {c.reference} with "
        f"{c.reference_steps} steps from the same noise, over the first {count} samples, for "
        "deterministic solvers. The reference's own error is its distance from half as many steps.",
    ]
