"""--mode=sweep: a trained run's quality against evaluations, as its config says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from diffusion.config import sampler
from diffusion.config.errors import field
from diffusion.evaluation import convergence as library
from diffusion.evaluation.classifiers import Classifier
from diffusion.evaluation.samples import evaluate_points, evaluate_samples
from diffusion.modes.drawer import Drawer
from diffusion.sampling.tables import Solver


def sweep(
    drawer: Drawer, params: Any, step: int, folder: Path, judge: Classifier | None = None
) -> None:
    """Measures, and writes sweep.json, sweep.md and sweep.png into ``folder``.

    Args:
      drawer, params: the model.
      step: of training, that the parameters are from.
      folder: of the run.
      judge: of class-conditional images; None leaves the distance to the exact flow alone.
    """
    experiment = drawer.experiment
    config, c = experiment.config, experiment.config.sweep
    _check(config)

    def make(solver: str, steps: int, field: str = "config.sweep.solvers") -> Solver:
        changed = config.copy_and_resolve_references()
        changed.sampler.solver, changed.sampler.steps = solver, steps
        return sampler.make_solver(changed, experiment.objective, field)

    try:
        entries, notes = library.plan(make, c.solvers, c.evaluations)
    except ValueError as error:
        named = str(error).startswith("config.")
        raise ValueError(str(error) if named else f"config.sweep: {error}") from error
    exact = make(c.reference, c.reference_steps, "config.sweep.reference")
    rough = make(c.reference, max(c.reference_steps // 2, 1), "config.sweep.reference")
    if not library.deterministic(exact):
        raise ValueError(f"config.sweep.reference={c.reference!r} must be a deterministic solver")
    for evaluations in {exact.evaluations, *(entry.budget for entry in entries)}:
        with field(f"config.sampler.acceleration={config.sampler.acceleration!r}"):
            experiment.guidance.acceleration.at(evaluations)  # its schedules may not fit them
    for note in notes:
        print(f"note: {note}")

    count = min(config.evaluation.count, config.sampler.batch_size)

    def reference() -> tuple[np.ndarray, float]:
        print(f"the exact flow, by {c.reference} with {exact.evaluations} evaluations")
        x, _ = drawer.draw(params, count, exact)
        other, _ = drawer.draw(params, count, library.fill(rough, exact.evaluations))
        return x, library.rmse(x, other)

    labels = drawer.conditioning(config.evaluation.count).label

    def quality(x: np.ndarray) -> dict[str, float]:
        if x.ndim == 2:
            r = evaluate_points(x, config.data.density)
            return {k: r[k] for k in ("sliced_wasserstein", "sliced_wasserstein_real")}
        if judge is None:
            return {}
        r = evaluate_samples(x, labels, judge, experiment.train, experiment.held_out)
        return {
            "frechet": r["frechet_half"],
            "frechet_real": r["frechet_real_halves"],
            "recognised": r["recognised"],
            "recognised_real": r["classifier_accuracy"],
        }

    result = library.run(
        folder / "sweep.json",
        _settings(config, step),
        entries,
        lambda table: drawer.draw(params, config.evaluation.count, table)[0],
        quality,
        reference,
    )
    title = f"{experiment.train.name}: quality against evaluations"
    twice = experiment.guidance.paired
    notes = [*_facts(config, step, count, twice), *notes]
    (folder / "sweep.md").write_text(library.markdown(result, title, notes))
    cost = " (guided: two network calls each)" if twice else ""
    library.figure(folder / "sweep.png", result, title, cost)
    print(f"sweep.png, sweep.md and sweep.json in {folder}")


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
    if sampler.gives_levels(config.sampler):
        raise ValueError(
            f"config.sampler.grid={config.sampler.grid!r} has the same steps at any number of "
            "evaluations; choose a grid without given levels"
        )


def _settings(config: ConfigDict, step: int) -> dict[str, Any]:
    """What results depend on, beside solver and steps."""
    sampler = config.sampler.to_dict()
    for name in ("solver", "steps", "preview_every", "batch_size"):
        sampler.pop(name)
    reference = {k: config.sweep[k] for k in ("reference", "reference_steps")}
    return {
        "training_step": step,
        "sampler": sampler,
        "evaluation": config.evaluation.to_dict(),
        "reference": reference | {"count": min(config.evaluation.count, config.sampler.batch_size)},
    }


def _facts(config: ConfigDict, step: int, count: int, twice: bool) -> list[str]:
    s, c = config.sampler, config.sweep
    guided = "; guidance makes it two network calls, in one batch of twice the size"
    facts = [
        f"Averaged parameters after step {step}; {config.evaluation.count} samples a point, the "
        f"same initial noises for all; grid {s.grid}, guidance {s.guidance!r}.",
        f"An evaluation is one call of the denoiser{guided if twice else ''}. Every solver takes "
        "the most steps that the budget allows; the last table has them.",
        f"Distance to the exact flow: root mean squared difference from {c.reference} with "
        f"{c.reference_steps} steps from the same noise, over the first {count} samples, for "
        "deterministic solvers. The reference's own error is its distance from half as many steps.",
    ]
    return facts
