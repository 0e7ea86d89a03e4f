"""Training that is meant to be cheaper: quality against steps and time, beside plain training.

    python benchmarks/cheaper_training.py --json=runs/benchmarks/cheaper_training.json

Trains configs/digits.py once per variant and seed: with another time distribution, weighting,
coupling of images and noise, or with representation alignment. Runs of one seed see the same images
and start from the same parameters. At some steps the averaged parameters are judged: samples by the
config's sampler, and by few steps of Euler's method (ddim); the loss of
plain training on held-out digits. The time of a step is measured first, in alternating windows.

--bases=v,flow,dit selects all rows, --variants="plain;optimal transport" only these two. Tokens are
aligned with a small classifier of noised digits, which is trained first, or with that of --encoder.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
import report

from configs import digits, digits_classifier
from diffusion import compiler
from diffusion.config.experiment import Experiment, build
from diffusion.data import batches as pipeline
from diffusion.evaluation import harness, selection
from diffusion.evaluation.metrics.metric import Data, of_array
from diffusion.modes import train
from diffusion.pipelines import samplers
from diffusion.training import parallel, validation
from diffusion.training.state import create
from diffusion.training.step import make_train_step

Overrides = Mapping[str, Any]

BASES: dict[str, Overrides] = {
    "v": {},
    "flow": {"objective.schedule": "rectified_flow", "objective.prediction": "flow"},
    "dit": {"model.name": "dit"},
}
COUPLED: dict[str, Overrides] = {
    "optimal transport": {"objective.coupling": "optimal_transport"},
    "optimal transport, same label": {"objective.coupling": "optimal_transport(same_label=True)"},
    "nearest of 4": {"objective.coupling": "nearest(k=4)"},
}
LOGIT_NORMAL: Overrides = {"objective.times": "logit_normal"}
ALIGNED: dict[str, Overrides] = {
    "alignment": {},
    "alignment, half of the steps": {},
}
VARIANTS: dict[str, dict[str, Overrides]] = {
    "v": {
        "plain": {},
        "logit-normal times": LOGIT_NORMAL,
        "min-SNR weighting": {"objective.weighting": "min_snr"},
        **COUPLED,
        "alignment": ALIGNED["alignment"],
    },
    "flow": {"plain": {}, "logit-normal times": LOGIT_NORMAL, **COUPLED},
    "dit": {"plain": {}, **ALIGNED},
}
METRICS = ("recognition(digits_svc)", "frechet(pixels)")
SAMPLERS = {"": None, "euler_4": ("ddim", 4), "euler_2": ("ddim", 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bases", default="flow,dit", help="of " + ", ".join(BASES))
    parser.add_argument("--variants", default="", help="names, ;-separated; default all")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--steps", default="150,300,600", help="at which a model is judged")
    parser.add_argument("--count", type=int, default=500, help="samples judged")
    parser.add_argument("--windows", type=int, default=7, help="of time, per variant")
    parser.add_argument("--encoder", default="", help="a classifier's workdir; default: trains one")
    parser.add_argument("--json", default="", help="where to write the results")
    arguments = parser.parse_args()
    print(compiler.tune())
    steps = [int(n) for n in arguments.steps.split(",")]
    chosen = [name for name in arguments.variants.split(";") if name]
    with tempfile.TemporaryDirectory() as folder:
        encoder = arguments.encoder or folder
        chosen = {
            base: {n: v for n, v in VARIANTS[base].items() if n in chosen or not chosen}
            for base in arguments.bases.split(",")
        }
        if not arguments.encoder and any("alignment" in n for b in chosen.values() for n in b):
            train_encoder(encoder)
        rows = []
        for base, variants in chosen.items():
            made = {
                n: prepared(make(base, n, v, steps[-1], encoder), arguments.count)
                for n, v in variants.items()
            }
            times = step_times(made, arguments.windows)
            for name in made:
                runs = []
                for seed in range(arguments.seeds):
                    runs.append(made[name].run(seed, steps))
                    say(base, name, seed, runs[-1][-1])
                rows += summarise(base, name, runs, times)
    columns = {"base": "base", "variant": "variant", "step_ms": "ms/step", "cost": "cost"}
    columns |= {"steps": "steps", "loss": "held-out loss", "recognised": "recognised [%]"}
    columns |= {"frechet": "Fréchet"}
    for name in filter(None, SAMPLERS):
        columns |= {f"{name}_recognised": f"{name} [%]", f"{name}_frechet": f"{name} Fréchet"}
    report.finish(rows, columns, arguments, "jaxlib", "flax", "optax", "scikit-learn")


def make(base: str, name: str, overrides: Overrides, steps: int, encoder: str) -> Experiment:
    """The experiment of a row."""
    config = digits.get_config()
    config.train.steps = steps
    fields = {**BASES[base], **overrides}
    if "alignment" in name:
        stop = steps // 2 if "half" in name else 0
        term = f"alignment(encoder={encoder!r}, hidden=256, stop={stop})"
        fields["objective.terms"] = term
    config.update_from_flattened_dict(fields)
    return build(config)


def train_encoder(workdir: str) -> None:
    """A classifier of noised digits."""
    config = digits_classifier.get_config()
    config.train.steps, config.train.batch_size = 400, 64
    train.run(config, workdir)


@dataclasses.dataclass(frozen=True)
class Training:
    """A row's compiled step and judge, for all of its seeds.

    Attributes:
      experiment: what is trained.
      step: (state, batch, key) -> (state, metrics).
      start: key -> the first state.
      judge: (state, step) -> figures.
    """

    experiment: Experiment
    step: Callable
    start: Callable[[jax.Array], Any]
    judge: Callable[[Any, int], dict[str, float]]

    def batches(self, seed: int) -> Iterator[Any]:
        """The training data."""
        return pipeline.batches(
            self.experiment.train, self.experiment.config.train.batch_size, seed
        )

    def run(self, seed: int, steps: list[int]) -> list[dict[str, float]]:
        """Trains, and judges the averaged parameters at those steps."""
        init_key, run_key = jax.random.split(jax.random.key(seed))
        state, data, found = self.start(init_key), self.batches(seed), []
        for i in range(1, steps[-1] + 1):
            state, _ = self.step(state, next(data), run_key)
            if i in steps:
                found.append({"steps": i, **self.judge(state, i)})
        return found


def prepared(experiment: Experiment, count: int) -> Training:
    """The training of a row; ``count`` samples are judged."""
    layout = parallel.make(experiment.config.parallel)
    parts = experiment.objective, experiment.optimizer, experiment.emas
    training = Training(experiment, None, None, None)
    example = next(training.batches(0))
    frozen = parallel.place(layout, experiment.frozen)
    step = make_train_step(*parts, parallel=experiment.config.parallel)
    model, drawer, held_out = experiment.pipeline, experiment.drawer, loss(experiment)
    data = Data(experiment.train, experiment.held_out)
    judges = harness.Harness(selection.make(METRICS, model), model, lambda: data)
    subjects = drawer.subjects(count)

    def judge(state: Any, at: int) -> dict[str, float]:
        row, params = {"loss": held_out(state, at)}, experiment.params(state.ema["ema"])
        for name, few in SAMPLERS.items():
            solver = few and samplers.make(model, few[0], steps=few[1]).solver
            samples = of_array(drawer.draw(params, subjects, solver=solver), subjects)
            judged = judges.evaluate(samples, params)
            prefix = name and name + "_"
            row[f"{prefix}recognised"] = 100 * judged["recognised"]
            row[f"{prefix}frechet"] = judged["fd_pixels_half"]
        return row

    return dataclasses.replace(
        training,
        step=lambda s, b, key: step(s, frozen, parallel.place_batch(layout, b), key),
        start=lambda key: parallel.initialise(layout, lambda k: create(*parts, k, example), key),
        judge=judge,
    )


def step_times(made: Mapping[str, Training], windows: int, length: int = 5) -> dict[str, Any]:
    """Milliseconds per step by variant, and ratios to the first variant: medians."""
    key, runs = jax.random.key(0), {}
    for name, training in made.items():
        data = list(itertools.islice(training.batches(0), length))
        runs[name] = data, training.step(training.start(key), data[0], key)[0]  # compiles
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(windows):
        for name, (data, state) in runs.items():
            began = time.perf_counter()
            for batch in data:
                state, _ = made[name].step(state, batch, key)
            jax.block_until_ready(state)
            runs[name] = data, state
            found[name].append(1000 * (time.perf_counter() - began) / length)
    first = next(iter(found.values()))
    return {
        name: {
            "step_ms": statistics.median(times),
            "cost": statistics.median(t / base for t, base in zip(times, first)),
        }
        for name, times in found.items()
    }


def loss(experiment: Experiment) -> Callable[[Any, int], float]:
    """The averaged parameters' loss under plain training's times, weighting and noise."""
    config = experiment.config.copy_and_resolve_references()
    plain = digits.get_config()
    for field in ("times", "weighting", "coupling"):
        config.objective[field] = plain.objective[field]
    config.objective.terms = ()
    validate = validation.make(
        build(config).objective,
        experiment.held_out,
        count=len(experiment.held_out),
        batch_size=100,
        seed=0,
        layout=parallel.make(config.parallel),
    )
    return lambda state, step: validate(state, step)["validation_loss"]


def summarise(
    base: str, name: str, runs: list[list[dict[str, float]]], times: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """A row for each step: means over the seeds, with their standard deviations."""
    rows = []
    for judged in zip(*runs):
        row = {"base": base, "variant": name, **times[name], "seeds": len(runs)}
        row["steps"] = judged[0]["steps"]
        for key in judged[0].keys() - {"steps"}:
            values = np.array([one[key] for one in judged])
            row[key] = float(values.mean())
            if len(runs) > 1:
                row[f"{key}_std"] = float(values.std(ddof=1))
        rows.append(row)
    return rows


def say(base: str, name: str, seed: int, last: Mapping[str, float]) -> None:
    """The progress."""
    values = ", ".join(f"{key} {value:.4g}" for key, value in last.items())
    print(f"{base}, {name}, seed {seed}: {values}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
