"""Time per sampling step around a network: one compiled scan against diffusers' Python loop.

    python benchmarks/sampling.py --json=runs/benchmarks/sampling.json

Both sides evaluate a convolutional network of the same layout, batch and steps, in float32 and
with all cores. What samplers are responsible for is the time outside the network: a step less a
bare call of the same network, on either side. Medians over alternating repetitions in one process.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import report
import torch

from diffusion import schedules
from diffusion.sampling import grids, solvers
from diffusion.sampling.sample import image_keys, sample

NETWORKS = {"small": (2, 32, (16, 8, 8, 3)), "large": (6, 64, (4, 32, 32, 3))}
"""Layers, channels, batch [B, H, W, C]."""

PAIRS = {
    "Euler": ("euler", diffusers.EulerDiscreteScheduler),
    "DPM-Solver++ 2M": ("dpmpp_2m", diffusers.DPMSolverMultistepScheduler),
    "UniPC": ("unipc", diffusers.UniPCMultistepScheduler),
}


class Convolutions(nn.Module):
    """``layers`` 3 x 3 convolutions with SiLU between."""

    layers: int
    channels: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        out = x.shape[-1]
        for _ in range(self.layers - 1):
            x = nn.silu(nn.Conv(self.channels, (3, 3))(x))
        return nn.Conv(out, (3, 3))(x)


def torch_convolutions(layers: int, channels: int, out: int) -> torch.nn.Module:
    """The same network."""
    modules, before = [], out
    for _ in range(layers - 1):
        modules += [torch.nn.Conv2d(before, channels, 3, padding=1), torch.nn.SiLU()]
        before = channels
    return torch.nn.Sequential(*modules, torch.nn.Conv2d(before, out, 3, padding=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=7, help="medians are over these")
    parser.add_argument("--json", default="", help="where to write the results")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if jax.default_backend() == "gpu" and torch.cuda.is_available() else "cpu"

    rows = []
    for size, (layers, channels, shape) in NETWORKS.items():
        for name, (ours, theirs) in PAIRS.items():
            if ours not in solvers.__all__:
                print(f"{name}: no {ours} here, left out")
                continue
            network = (layers, channels, shape)
            timed = {
                **our_runs(getattr(solvers, ours), *network, arguments.steps),
                **their_runs(theirs, *network, arguments.steps, device),
            }
            rows.append({"network": size, "sampler": name, "shape": list(shape)})
            rows[-1] |= measure(timed, arguments.steps, arguments.repetitions)
            print(
                "{network}, {sampler}: {ours:.3g} and {theirs:.3g} ms".format(**rows[-1]),
                flush=True,
            )
    about = report.environment("jax", "jaxlib", "flax", "torch", "diffusers")
    print(f"{about['cpu']}, {about['cores']} cores, load {about['load']:.1f}; {about['devices']}")
    columns = {"network": "network", "sampler": "sampler", "ours": "scan [ms/step]"}
    columns |= {"ours_network": "its network", "ours_share": "outside [%]"}
    columns |= {"theirs": "diffusers [ms/step]", "theirs_network": "its network "}
    columns |= {"theirs_share": "outside [%] ", "ratio": "diffusers / scan"}
    print(report.table(rows, columns))
    if arguments.json:
        report.save(arguments.json, about | {"arguments": vars(arguments)}, rows)


def our_runs(
    solver: Callable, layers: int, channels: int, shape: tuple[int, ...], steps: int
) -> dict[str, Callable]:
    """The jitted scan, and as many bare calls."""
    network = Convolutions(layers, channels)
    x = jax.random.normal(jax.random.key(0), shape)
    params = network.init(jax.random.key(0), x)
    table = jax.device_put(solver(grids.uniform(schedules.linear(), steps)))
    keys = image_keys(0, np.arange(shape[0]))

    @jax.jit
    def draw(params: Any, table: Any, x: jax.Array) -> jax.Array:
        def denoise(x, level):
            return (x - level.sigma * network.apply(params, x)) / level.alpha

        return sample(denoise, table, keys, shape[1:], x_init=x)

    @partial(jax.jit, donate_argnums=1)
    def bare(params: Any, x: jax.Array) -> jax.Array:
        return network.apply(params, x)

    def bare_calls() -> None:
        y = jnp.array(x)
        for _ in range(steps):
            y = bare(params, y)
        y.block_until_ready()

    return {"ours": lambda: draw(params, table, x).block_until_ready(), "ours_network": bare_calls}


def their_runs(
    scheduler_class: type,
    layers: int,
    channels: int,
    shape: tuple[int, ...],
    steps: int,
    device: str,
) -> dict[str, Callable]:
    """The loop of diffusers' pipelines, and as many bare calls."""
    torch.manual_seed(0)
    network = torch_convolutions(layers, channels, shape[-1]).to(device).eval()
    scheduler = scheduler_class(beta_schedule="linear")
    x = torch.randn(shape[0], shape[3], shape[1], shape[2], device=device)

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    @torch.no_grad()
    def loop() -> None:
        scheduler.set_timesteps(steps, device=device)
        y = x * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            eps = network(scheduler.scale_model_input(y, t))
            y = scheduler.step(eps, t, y).prev_sample
        wait()

    @torch.no_grad()
    def bare() -> None:
        y = x
        for _ in range(steps):
            y = network(y)
        wait()

    return {"theirs": loop, "theirs_network": bare}


def measure(timed: dict[str, Callable], steps: int, repetitions: int) -> dict[str, Any]:
    """Median milliseconds a step of each, taken in turn; and what follows from them."""
    seconds = {name: [] for name in timed}
    for repetition in range(repetitions + 1):
        for name, function in timed.items():
            began = time.perf_counter()
            function()
            if repetition:  # the first compiles and warms up
                seconds[name].append(time.perf_counter() - began)
    result = {name: 1e3 * float(np.median(s)) / steps for name, s in seconds.items()}
    spread = {f"{name}_all": [1e3 * s / steps for s in all_] for name, all_ in seconds.items()}
    for side in ("ours", "theirs"):
        result[f"{side}_share"] = 100 * (1 - result[f"{side}_network"] / result[side])
    return result | {"ratio": result["theirs"] / result["ours"]} | spread


if __name__ == "__main__":
    main()
