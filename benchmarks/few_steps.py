"""Points in one, two and four steps, by every method, over seeds; and what a training step costs.

    python -m benchmarks.few_steps --workdir=runs/few_steps2d

Trains the teacher (``configs/toy2d.py``) and, of each method and seed, a student
(``configs/few_steps2d.py:METHOD``), unless WORKDIR has them already, by the modes that ``main.py``
calls. Quality is the sliced Wasserstein distance of 10,000 samples to fresh points. The cost of a
step is relative to the teacher's own, as the loops report both.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np

from configs import few_steps2d, toy2d
from diffusion import compiler
from diffusion.data import densities
from diffusion.evaluation.metrics.wasserstein import sliced_wasserstein
from diffusion.modes import train
from diffusion.pipelines import samplers
from diffusion.pipelines.drawer import Drawer
from diffusion.pipelines.from_run import open_run

POINTS = 10_000
STEPS = (1, 2, 4)


def quality(workdir: Path, solver: str, steps: int, seed: int) -> float:
    """The sliced Wasserstein distance of a run's samples to fresh points."""
    run = open_run(workdir)
    sampler = samplers.make(run.pipeline, solver, "uniform", steps)
    drawer = Drawer(run.pipeline, sampler, batch_size=POINTS, seed=seed)
    x = drawer.draw(run.load(), [0] * POINTS)
    fresh = densities.sample("two_moons", POINTS, np.random.default_rng(10_000 + seed))
    return sliced_wasserstein(x, fresh)


def trained(workdir: Path, config: str, seed: int, teacher: Path | None) -> Path:
    """The workdir of a run, trained now unless it is done."""
    c = toy2d.get_config() if teacher is None else few_steps2d.get_config(config)
    c.seed = seed
    c.evaluation.metrics = ()
    if teacher is not None:
        c.few_steps.teacher = str(teacher) if c.few_steps.teacher else ""
        c.train.init_from = str(teacher) if c.train.init_from else ""
    train.run(c, str(workdir))
    return workdir


def step_seconds(workdir: Path) -> float:
    """The median duration of a training step, as the loop measured it."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["step_seconds"] for row in rows if "step_seconds" in row)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", required=True, type=Path)
    parser.add_argument("--only", default=",".join(few_steps2d.METHODS), help="methods, by commas")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="by default WORKDIR/few_steps.json")
    arguments = parser.parse_args()
    compiler.tune()
    folder, seeds = arguments.workdir, range(arguments.seeds)
    teacher = trained(folder / "teacher", "", 0, None)
    base, rows = step_seconds(teacher), []
    for steps in (1, 2, 4, 20):
        found = [quality(teacher, "euler", steps, seed) for seed in seeds]
        rows.append({"method": "teacher, Euler", "steps": steps, "distance": found})
    found = [quality(teacher, "heun", 32, seed) for seed in seeds]
    rows.append({"method": "teacher, Heun", "steps": 32, "distance": found})
    for method in arguments.only.split(","):
        began = time.monotonic()
        try:
            runs = [trained(folder / f"{method}_{s}", method, s, teacher) for s in seeds]
        except (ValueError, FloatingPointError) as error:
            print(f"{method}: {error}", flush=True)
            continue
        cost = statistics.median(step_seconds(run) for run in runs) / base
        for steps in STEPS:
            solver = few_steps2d.get_config(method).sampler.solver
            found = [quality(run, solver, steps, seed) for seed, run in zip(seeds, runs)]
            rows.append({"method": method, "steps": steps, "distance": found, "cost": cost})
        print(f"{method}: {time.monotonic() - began:.0f} s", flush=True)
        path = arguments.json or folder / "few_steps.json"
        path.write_text(json.dumps(rows, indent=2) + "\n")
        print(table(rows), flush=True)


def table(rows: list[dict]) -> str:
    """Markdown: mean (lowest to highest) by method and number of steps."""
    methods = list(dict.fromkeys(row["method"] for row in rows))
    lines = ["| | 1 step | 2 steps | 4 steps | a training step |", "|---|---|---|---|---|"]
    for method in methods:
        mine = {row["steps"]: row for row in rows if row["method"] == method}
        cells = []
        for steps in STEPS:
            if steps not in mine:
                cells.append("")
                continue
            found = mine[steps]["distance"]
            cells.append(f"{statistics.mean(found):.3f} ({min(found):.3f}–{max(found):.3f})")
        cost = next((row["cost"] for row in mine.values() if "cost" in row), None)
        lines.append(
            f"| {method} | {' | '.join(cells)} | {'' if cost is None else f'{cost:.2f}'} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
