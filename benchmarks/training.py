"""The cost of the training loop besides the step.

    python benchmarks/training.py --json=runs/benchmarks/training.json

Three comparisons, each of windows that alternate within one process, so that both sides see the
same machine; medians over the pairs of windows.

loop: the whole of ``fit`` (data, meter, log, signals, a batch ahead on the device) against a bare
loop around a hand-written jitted step of the same model: the same loss, noise, optimiser, average
and metrics, its own reader of the same data, nothing else.

checkpoints: windows of ``fit`` with an asynchronous save at their start against windows without,
as a share of 500 steps.

layouts: a step under fsdp against pmap on four virtual CPU devices, in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import optax
import report
from ml_collections import ConfigDict

from configs import digits, toy2d
from diffusion import compiler, ema
from diffusion.config.experiment import Experiment, build
from diffusion.data import batches as pipeline
from diffusion.objectives.objective import Context
from diffusion.training import parallel
from diffusion.training.loop import fit
from diffusion.training.state import create
from diffusion.training.step import make_train_step

SAVE_EVERY = 500  # steps over which the cost of a checkpoint is spread


def unet() -> ConfigDict:
    """The U-Net of configs/digits.py, 0.7 M parameters, batch of 64."""
    return digits.get_config()


def small_unet() -> ConfigDict:
    """The same with a batch of 8: more steps per second for as large a state."""
    config = digits.get_config()
    config.train.batch_size = 8
    return config


def points() -> ConfigDict:
    """The MLP of configs/toy2d.py, whose step is a few milliseconds."""
    return toy2d.get_config()


def transformer() -> ConfigDict:
    """A DiT on the digits, most of whose leaves fsdp cuts."""
    config = digits.get_config()
    config.model.name = "dit"
    return config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=7, help="number of pairs of windows")
    parser.add_argument("--seconds", type=float, default=3.0, help="approximate length of a window")
    parser.add_argument("--part", choices=["all", "loop", "layouts"], default="all")
    parser.add_argument("--small", action="store_true", help="short windows, to try the script")
    parser.add_argument("--json", default="", help="where to write the results")
    arguments = parser.parse_args()
    print(compiler.tune())
    if arguments.small:
        arguments.pairs, arguments.seconds = 1, 0.05
    length = {"pairs": arguments.pairs, "seconds": arguments.seconds}
    if arguments.part == "layouts":
        print(json.dumps([layouts(transformer, **length), layouts(unet, **length)]))
        return
    rows = [loop(points, **length), loop(unet, **length)]
    if arguments.part == "all":
        rows += [checkpoints(small_unet, **length), checkpoints(unet, **length)]
        rows += in_four_devices(**length)
    columns = {"what": "what", "model": "model", "steps": "steps per window", "pairs": "pairs"}
    columns |= {"base": "base [ms/step]", "ours": "compared [ms/step]", "overhead": "overhead [%]"}
    columns |= {"low": "lowest", "high": "highest", "seconds_per_save": "seconds per save"}
    report.finish(rows, columns, arguments, "jaxlib", "flax", "optax", "orbax-checkpoint", "grain")


def loop(config: Callable[[], ConfigDict], pairs: int, seconds: float) -> dict[str, Any]:
    """``fit`` against the bare loop, which runs in between, in one of ``fit``'s hooks."""
    experiment = build(config())
    bare = bare_loop(experiment)
    bare(1)  # compiles
    steps = steps_for(bare, seconds)
    windows = fit_windows(experiment, pairs + 1, steps, between=lambda: bare(steps))
    ours, base = zip(*windows[1:])  # the first has the compilation
    return row("fit / bare loop", config, steps, base, ours)


def checkpoints(config: Callable[[], ConfigDict], pairs: int, seconds: float) -> dict[str, Any]:
    """Windows of ``fit`` that begin with a save against those between them."""
    experiment = build(config())
    bare = bare_loop(experiment)
    bare(1)
    steps = steps_for(bare, seconds)
    times = [ours for ours, _ in fit_windows(experiment, 2 * pairs + 2, steps, save_every=2)]
    # The save of step 2 k w comes after the hook there: it falls into the window that follows.
    base, ours = times[3::2][:pairs], times[2::2][:pairs]
    spread = [b + (o - b) * steps / SAVE_EVERY for b, o in zip(base, ours)]
    found = row(f"a save per {SAVE_EVERY} steps / none", config, steps, base, spread)
    return found | {"seconds_per_save": statistics.median(o - b for o, b in zip(ours, base))}


def layouts(config: Callable[[], ConfigDict], pairs: int, seconds: float) -> dict[str, Any]:
    """A step under fsdp against pmap, over all devices."""
    experiment = build(config())
    runs = [partial(run_steps, *prepared(experiment, name)) for name in parallel.NAMES]
    for run in runs:
        run(2)
    steps = steps_for(runs[0], seconds)
    base, ours = zip(*[[timed(run, steps) for run in runs] for _ in range(pairs)])
    return row(f"fsdp / pmap, {jax.device_count()} devices", config, steps, base, ours)


def in_four_devices(pairs: int, seconds: float) -> list[dict[str, Any]]:
    """``layouts`` in a process with four virtual devices."""
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
    command = [sys.executable, __file__, "--part=layouts", f"--pairs={pairs}"]
    done = subprocess.run(
        [*command, f"--seconds={seconds}"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "NPROC": "16", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def bare_loop(experiment: Experiment) -> Callable[[int], float]:
    """Steps -> seconds: a training loop as one would write it by hand."""
    objective, tx = experiment.objective, experiment.optimizer.tx
    profile = experiment.emas["ema"]
    data = read(experiment)
    key = jax.random.key(1)
    params = jax.jit(objective.init)(jax.random.key(0), next(data))
    average = jax.tree.map(jnp.copy, params)
    state = [(jnp.int32(0), params, tx.init(params), average)]

    @partial(jax.jit, donate_argnums=0)
    def step(state, batch, key):
        count, params, opt_state, average = state

        def loss_fn(params):
            noise_key = jax.random.fold_in(key, count)
            return objective.loss(params, Context(step=count), batch, noise_key)

        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        average = ema.update(average, params, profile(count + 1))
        metrics = metrics | {
            "loss": loss,
            "gradient_norm": optax.tree.norm(grads),
            "parameter_norm": optax.tree.norm(params),
            "learning_rate": experiment.optimizer.learning_rate(count),
        }
        return (count + 1, params, opt_state, average), metrics

    def run(steps: int) -> float:
        began = time.perf_counter()
        for _ in range(steps):
            state[0], _ = step(state[0], next(data), key)
        jax.block_until_ready(state[0])
        return time.perf_counter() - began

    return run


def fit_windows(
    experiment: Experiment,
    count: int,
    steps: int,
    between: Callable[[], float] = lambda: 0.0,
    save_every: int | None = None,
) -> list[tuple[float, float]]:
    """Seconds of each window of ``fit``, and the result of ``between`` after it.

    Args:
      experiment: what is trained.
      count: of windows; the first has the compilation too.
      steps: in a window.
      between: called after each window, while ``fit`` waits.
      save_every: windows from one checkpoint to the next; None for none but at the end.
    """
    found, began = [], time.perf_counter()

    def stamp(state: Any, step: int) -> None:
        nonlocal began
        jax.block_until_ready(state)
        seconds = time.perf_counter() - began
        found.append((seconds, between()))
        began = time.perf_counter()

    with tempfile.TemporaryDirectory() as workdir:
        fit(
            objective=experiment.objective,
            optimizer=experiment.optimizer,
            emas=experiment.emas,
            batches=lambda start: read(experiment, start),
            steps=count * steps,
            workdir=workdir,
            log_every=experiment.config.train.log_every,
            checkpoint_every=(save_every or 2 * count) * steps,
            hooks=[(steps, stamp)],
        )
    return found


def prepared(experiment: Experiment, name: str) -> tuple[Callable, list[Any], list[Any], Any]:
    """The compiled step, state, batches and key in a layout."""
    layout = parallel.make(name)
    make = partial(create, experiment.objective, experiment.optimizer, experiment.emas)
    data = read(experiment)
    example = next(data)
    state = parallel.initialise(layout, lambda key: make(key, example), jax.random.key(0))
    batches = [parallel.place_batch(layout, next(data)) for _ in range(8)]
    parts = (experiment.objective, experiment.optimizer, experiment.emas)
    step = make_train_step(*parts, parallel=name)
    return step, [state], batches, parallel.place(layout, jax.random.key(1))


def run_steps(step: Callable, state: list[Any], batches: list[Any], key: Any, steps: int) -> None:
    """Runs that number of steps and waits for them."""
    for i in range(steps):
        state[0], _ = step(state[0], None, batches[i % len(batches)], key)
    jax.block_until_ready(state[0])


def read(experiment: Experiment, start: int = 0) -> Iterator[Any]:
    """The training data from that step on."""
    config = experiment.config
    return pipeline.batches(experiment.train, config.train.batch_size, config.seed, start)


def timed(run: Callable[[int], Any], steps: int) -> float:
    """Seconds."""
    began = time.perf_counter()
    run(steps)
    return time.perf_counter() - began


def steps_for(run: Callable[[int], Any], seconds: float) -> int:
    """The number of steps that take about that long; at least 10."""
    run(10)
    return max(10, round(seconds * 10 / timed(run, 10)))


def row(
    what: str,
    config: Callable[[], ConfigDict],
    steps: int,
    base: list[float],
    ours: list[float],
) -> dict[str, Any]:
    """Medians, and the overhead: the median of the pairs' ratios, with its range."""
    overheads = [100 * (o / b - 1) for o, b in zip(ours, base)]
    found = {
        "what": what,
        "model": config.__name__,
        "steps": steps,
        "pairs": len(overheads),
        "base": 1000 * statistics.median(base) / steps,
        "ours": 1000 * statistics.median(ours) / steps,
        "overhead": statistics.median(overheads),
        "low": min(overheads),
        "high": max(overheads),
        "overheads": overheads,
    }
    print("{what}, {model}: {overhead:+.1f} %".format(**found), file=sys.stderr, flush=True)
    return found


if __name__ == "__main__":
    main()
