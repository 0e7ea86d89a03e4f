"""Cheaper sampling at stated quality: guidance interval, caching, token merging against full cost.

    python benchmarks/cheaper.py --json=runs/benchmarks/cheaper.json

Every setting draws the same images, from the same noise and parameters, as the trained run in
--workdir does at full cost; without one, ``configs/digits.py`` is trained first. Its time is the
median, over alternating repetitions, of a batch's time over that of a batch at full cost in the
same repetition. Operations are those of matrix products and convolutions in the networks,
counted in their traces, over all evaluations. The share recognised and the Fréchet distance
come from the run's own evaluation; "RMS" is the root mean squared difference from the images at
full cost. Fewer steps compete with every cache, so the table has them, too.

    python benchmarks/cheaper.py --sd15 --json=runs/benchmarks/cheaper_sd15.json

times a forward pass of Stable Diffusion 1.5's U-Net with random weights instead: the share of its
time that remains when deep features are reused or tokens are merged. Quality is not measured.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import jax.numpy as jnp
import numpy as np
import report

from configs import base
from diffusion import compiler, specs
from diffusion.conditioning import Conditioning
from diffusion.config import drawing, judging
from diffusion.config.drawing import Drawing
from diffusion.evaluation import figures
from diffusion.evaluation.convergence import rmse
from diffusion.evaluation.metrics.metric import of_array
from diffusion.levels import NoiseLevel
from diffusion.models import reuse
from diffusion.models.token_merging import with_merged_tokens
from diffusion.models.unet import sd15
from diffusion.pipelines import draw as programs
from diffusion.pipelines.drawer import Drawer
from diffusion.pipelines.pipeline import Params
from diffusion.runs import workdir as workdirs
from diffusion.sampling.guidance.chain import AFTER
from diffusion.sampling.sample import image_keys, sample
from diffusion.training import flops

ROOT = Path(__file__).parent.parent
Setting = dict[str, Any]  # fields of config.sampler, and a link that guidance is given besides
SETTINGS: tuple[Setting, ...] = (
    {"steps": 10},
    {"steps": 7},
    {"steps": 5},
    {"interval": "interval(0, 2)"},
    {"interval": "interval(0.3, 2)"},
    {"acceleration": "guidance_cache(every(2))"},
    {"acceleration": "guidance_cache(every(4))"},
    {"acceleration": "cache(every(2))"},
    {"acceleration": "cache(every(3))"},
    {"acceleration": "cache(every(5))"},
    {"acceleration": "cache(dense(3))"},
    {"acceleration": "cache(every(3), keep=2)"},
    {"acceleration": "cache(every(2), keep=0)"},
    {"acceleration": "cache(every(3), keep=0)"},
    {"acceleration": "cache(adaptive(0.1))"},
    {"acceleration": "cache(adaptive(0.2))"},
    {"acceleration": "cache(adaptive(0.4))"},
    {"acceleration": "cache(every(2))", "interval": "interval(0, 2)"},
    {"acceleration": "merge_tokens(0.25, at_least={at_least})"},
    {"acceleration": "merge_tokens(0.5, at_least={at_least})"},
    {"acceleration": "merge_tokens(0.75, at_least={at_least})"},
    {"acceleration": "merge_tokens(0.5, at_least={at_least}), cache(every(3))"},
)
MERGED = (0.25, 0.5, 0.75)
KEPT = (1, 2, 3, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", default="", help="of a trained run; by default digits")
    parser.add_argument("--count", type=int, default=1000, help="images judged")
    parser.add_argument("--repetitions", type=int, default=7, help="of timed batches")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--at-least", type=int, default=256, help="tokens of merged maps")
    parser.add_argument("--images", default="", help="folder for a grid of each setting")
    parser.add_argument("--only", default="", help="settings that match this regular expression")
    parser.add_argument("--sd15", action="store_true", help="time Stable Diffusion's U-Net")
    parser.add_argument("--latents", type=int, default=64, help="its input's side")
    parser.add_argument("--json", default="", help="where to write the results")
    arguments = parser.parse_args()
    print(compiler.tune())
    if arguments.sd15:
        rows = forwards(arguments)
        columns = {"what": "", "time": "time", "flops": "operations"}
    elif arguments.workdir:
        rows = settings(Path(arguments.workdir), arguments)
    else:
        with tempfile.TemporaryDirectory() as folder:
            config = ROOT / "configs" / "digits.py"
            command = [sys.executable, "main.py", f"--config={config}", f"--workdir={folder}"]
            subprocess.run(command, check=True, cwd=ROOT)
            rows = settings(Path(folder), arguments)
    if not arguments.sd15:
        columns = {"what": "", "time": "time", "flops": "operations"}
        columns |= {"recognised": "recognised", "frechet": "Fréchet", "rms": "RMS to full"}
    report.finish(rows, columns, arguments, "jaxlib", "flax", "numpy", "scikit-learn")


def settings(workdir: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per setting."""
    config = base.get_config()
    config.update(workdirs.read_config(workdir))
    config.sampler.batch_size = arguments.batch
    model = drawing.opened(config, str(workdir))
    full, params = model.drawer, model.params
    print(f"{workdir}: {config.data.name}, {config.model.name}, step {model.step}")
    target, cost = drawn(model, full, arguments.count), operations(full, params)
    judge = judging.make(config, model.pipeline, lambda: model.data)

    def quality(setting: Setting, x: np.ndarray) -> dict[str, Any]:
        row = {"what": describe(setting), "setting": setting, "rms": rmse(x, target)}
        found = judge.evaluate(of_array(x, model.subjects(len(x))), params)
        names = {"recognised": "recognised", "fd_pixels_half": "frechet"}
        names["fd_pixels_half_real"] = "frechet_real"
        return row | {names[name]: value for name, value in found.items() if name in names}

    rows = [quality({}, target) | {"time": 1.0, "flops": 1.0}]
    show(arguments.images, {}, target)
    print(json.dumps(rows[0]), flush=True)
    chosen = [s for s in SETTINGS if re.search(arguments.only, describe(s))]
    for setting in chosen:
        drawer, notes = changed(model, setting, arguments.at_least)
        if unusable(drawer, notes):
            print(f"{setting}: not for this model")
            continue
        samples = drawn(model, drawer, arguments.count)
        row = quality(setting, samples)
        row["time"], row["all"] = ratio(full, drawer, params, arguments)
        row["flops"] = operations(drawer, params) / cost
        show(arguments.images, setting, samples)
        rows.append(row)
        print(json.dumps({k: v for k, v in row.items() if k != "all"}), flush=True)
    return rows


def changed(model: Drawing, setting: Setting, at_least: int) -> tuple[Drawer, list[str]]:
    """How a setting draws, and what a user should know about it."""
    config = model.config.copy_and_resolve_references()
    with config.ignore_type():
        for name, value in setting.items():
            if name == "interval":
                given, own = config.sampler.guidance, model.pipeline.defaults.guidance
                links = specs.texts(own if given == "auto" else given)
                pairs = sum(link.place < AFTER for link in model.drawer.chain)
                config.sampler.guidance = (*links[:pairs], value, *links[pairs:])
            else:
                value = value if name == "steps" else value.format(at_least=at_least)
                config.sampler[name] = value
    return drawing.drawer(config, model.pipeline)


def drawn(model: Drawing, drawer: Drawer, count: int) -> np.ndarray:
    """Samples as the data are."""
    x = drawer.draw(model.params, model.subjects(count), model.negative)
    return model.pipeline.codec.decode_all(model.params, x)


def show(folder: str, setting: Setting, x: np.ndarray) -> None:
    """The first 50 images as a PNG, if a folder is given."""
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = re.sub(r"\W+", "_", describe(setting)).strip("_")
        figures.save_png(Path(folder) / f"{name}.png", figures.image_grid(x[:50], 10, scale=3))


def describe(setting: Setting) -> str:
    """The setting in words."""
    words = [f"steps {value}" if name == "steps" else value for name, value in setting.items()]
    return ", ".join(words).replace(", at_least={at_least}", "") or "full"


def ratio(
    full: Drawer, drawer: Drawer, params: Params, arguments: argparse.Namespace
) -> tuple[float, list[float]]:
    """Ratios of a batch's time to full cost, by repetition; both are compiled already."""

    def seconds(d: Drawer) -> float:
        began = time.perf_counter()
        d.draw(params, d.subjects(arguments.batch))
        return time.perf_counter() - began

    both = [(seconds(drawer), seconds(full)) for _ in range(arguments.repetitions)]
    ratios = [a / b for a, b in both]
    return statistics.median(ratios), ratios


def unusable(drawer: Drawer, notes: list[str]) -> bool:
    """Whether the setting changes nothing for this model."""
    guides = drawer.acceleration.guidance is not None or interval_of(drawer) is not None
    return (guides and not drawer.paired) or any("merge_tokens" in note for note in notes)


def interval_of(drawer: Drawer) -> Any:
    """The link that limits guidance to some levels, or None."""
    return next((link for link in drawer.chain if link.name == "interval"), None)


def operations(drawer: Drawer, params: Params) -> int:
    """Operations of all evaluations, per image, under this sampler's settings and branches."""
    solver = drawer.sampler.solver
    level, evaluations = solver.level, solver.evaluations
    acceleration = drawer.acceleration.at(evaluations)
    model = acceleration.merged(drawer.pipeline.denoiser(params))
    x = jnp.zeros((1, *drawer.pipeline.shape))
    cond, _ = drawer.conditioning(params, drawer.subjects(1))
    half = NoiseLevel(*map(jnp.float32, (0.5, 0.7, 0.7)))
    evaluate = partial(model, x, half, cond)
    whole = part = flops.count(evaluate)
    if acceleration.cache is not None:
        keep = acceleration.keep
        features = jax.eval_shape(lambda: reuse.record(evaluate, keep)()[1])
        part = flops.count(lambda f: reuse.reuse(evaluate, keep, f)(), features)
    inside, link = np.ones(evaluations, bool), interval_of(drawer)
    if link is not None:
        low, high = link.numbers["low"], link.numbers["high"]
        below = np.isinf(high) | (level.sigma <= np.nan_to_num(high) * level.alpha)
        inside = (low * level.alpha <= level.sigma) & below
    both = True if acceleration.guidance is None else acceleration.guidance
    calls = np.where(inside & drawer.paired & both, 2, 1)
    refresh = np.ones(evaluations, bool) if acceleration.cache is None else acceleration.cache
    if np.ndim(refresh) == 0:
        refresh = decided(drawer, params)
    return int(np.sum(calls * np.where(refresh, whole, part)))


def decided(drawer: Drawer, params: Params) -> np.ndarray:
    """The evaluations at which a threshold refreshes, for the first batch of images."""
    solver, seen = drawer.sampler.solver, []
    keys = image_keys(drawer.seed, np.arange(drawer.batch_size))
    cond, null = drawer.conditioning(params, drawer.subjects(drawer.batch_size))
    program = programs.program(drawer.pipeline, drawer.sampler, drawer.companions)
    given = solver.evaluations, drawer.companions, drawer.acceleration

    @jax.jit
    def run(weights: Any) -> jax.Array:
        denoise = program.guided(weights, cond, null, drawer.chain)

        def step(x: jax.Array, level: NoiseLevel, memory: Any) -> tuple:
            estimate, after = denoise.step(x, level, memory)
            jax.debug.callback(lambda n: seen.append(int(n)), after.refreshed, ordered=True)
            return estimate, after

        return sample(denoise._replace(step=step), solver, keys, drawer.pipeline.shape)

    jax.block_until_ready(run(programs.weights(params, *given)))
    jax.effects_barrier()
    return np.diff([0, *seen]) > 0


def forwards(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows for a forward pass of Stable Diffusion 1.5's U-Net."""
    gpu = jax.default_backend() == "gpu"
    dtype = jnp.bfloat16 if gpu else jnp.float32
    network = sd15(dtype=dtype)
    rng = np.random.default_rng(0)
    side = arguments.latents
    x = jnp.asarray(rng.standard_normal((1, side, side, 4)), dtype)
    cond = Conditioning(context=jnp.asarray(rng.standard_normal((1, 77, 768)), dtype))
    t = jnp.full(1, 500.0)
    shapes = jax.eval_shape(lambda: network.init(jax.random.key(0), x, t, cond))
    params = jax.tree.map(
        lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape, np.float32), dtype), shapes
    )

    def apply(params: Any, x: jax.Array) -> jax.Array:
        return network.apply(params, x, t, cond)

    ways: dict[str, Callable] = {"full": apply}
    for keep in KEPT if re.search(arguments.only, "deep features") else ():
        features = jax.eval_shape(lambda k=keep: reuse.record(apply, k)(params, x)[1])
        features = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), features)
        ways[f"deep features reused, {keep} kept"] = reuse.reuse(apply, keep, features)
    for share in MERGED if re.search(arguments.only, "merged") else ():
        ways[f"merged {share}"] = with_merged_tokens(apply, share, side**2, jax.random.key(0))
    compiled = {name: jax.jit(way) for name, way in ways.items()}
    seconds = {name: [] for name in ways}
    for repetition in range(arguments.repetitions + 1):
        for name, way in compiled.items():
            began = time.perf_counter()
            jax.block_until_ready(way(params, x))
            if repetition:
                seconds[name].append(time.perf_counter() - began)
            print(f"{name}: {time.perf_counter() - began:.3g} s", flush=True)
    cost = {name: flops.count(way, params, x) for name, way in ways.items()}
    rows = []
    for name in ways:
        ratios = [a / b for a, b in zip(seconds[name], seconds["full"])]
        rows.append({
            "what": name, "time": statistics.median(ratios), "flops": cost[name] / cost["full"],
            "gflop": cost[name] / 1e9, "seconds": seconds[name],
        })  # fmt: skip
    for keep in KEPT:
        one = next((row for row in rows if row["what"].endswith(f", {keep} kept")), None)
        if one is None:
            continue
        for n in (2, 3, 5):
            mean = {k: (1 + (n - 1) * one[k]) / n for k in ("time", "flops")}
            rows.append({"what": f"every({n}), {keep} kept: mean of an evaluation", **mean})
    return rows


if __name__ == "__main__":
    main()
