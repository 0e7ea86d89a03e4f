"""What adapters cost: a sampling step with a LoRA, and a step of training one.

    python benchmarks/adapters.py

Networks have random parameters and the shapes of configs/emoji_text_to_image.py and of a U-Net like
Stable Diffusion's, a quarter as wide. A step of sampling is measured without an adapter, with one
that was merged before (*fused*) and with one that is merged within the compiled sampler, whose
strength is an argument (*unfused*). A step of training is measured for all parameters and for the
LoRA's alone. All take turns, and figures are medians of ratios within a turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import report

from diffusion import compiler, denoiser, ema, predictions, schedules
from diffusion.adapters.low_rank.lora import lora
from diffusion.adapters.low_rank.merge import merge
from diffusion.conditioning import Conditioning
from diffusion.models.unet import UNet, sd15
from diffusion.objectives.adapting import BASE, Adapting
from diffusion.objectives.denoising import Denoising
from diffusion.sampling import sample as sampling
from diffusion.sampling.grids import uniform
from diffusion.sampling.solvers.one_step import ddim
from diffusion.training import optimizers, parallel
from diffusion.training.state import create
from diffusion.training.step import make_train_step

STEPS = 20
CASES = {  # name -> (network, side and channels of x, width of the context, batch)
    "emoji": (
        UNet(
            widths=(32, 96, 192),
            blocks=1,
            attention=(0, 1, 1),
            mid_attention=1,
            num_heads=4,
            norm_groups=16,
            linear_projection=True,
            out_channels=4,
        ),
        (16, 16, 4),
        128,
        32,
    ),
    "quarter of SD 1.5": (sd15(widths=(80, 160, 320, 320), norm_groups=16), (32, 32, 4), 192, 4),
}
COLUMNS = {
    "case": "",
    "fused": "sampling, fused / base",
    "unfused": "unfused / base",
    "training": "training, full / LoRA",
    "state": "optimiser, LoRA / full",
    "parameters": "parameters, LoRA / full",
}


def main() -> None:
    parser = report.arguments(__doc__, "adapters")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--targets", default="attention")
    arguments = parser.parse_args()
    compiler.tune()
    with report.Report(arguments, COLUMNS) as table:
        for name, case in CASES.items():
            if not arguments.only or any(part in name for part in arguments.only.split(";")):
                table.add({"case": name, **measured(*case, arguments)})


def measured(net: UNet, shape: tuple[int, ...], width: int, batch: int, arguments: Any) -> dict:
    """The ratios of one network."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(batch, *shape)), jnp.float32)
    cond = Conditioning(context=jnp.asarray(rng.normal(size=(batch, 16, width)), jnp.float32))
    base = jax.jit(net.init)(jax.random.key(0), x, jnp.zeros(batch), cond)["params"]
    adapter = lora(arguments.rank, targets=arguments.targets)
    own = adapter.init(jax.random.key(1), base)
    sample = _sampling(net, base, adapter.deltas(own), x, cond)
    train, sizes = _training(net, base, adapter, x, cond)
    times = {name: [] for name in (*sample, *train)}
    for turn in range(-1, arguments.repetitions + 1):
        for name, run in {**sample, **train}.items():
            seconds = _seconds(run, arguments.seconds if turn > 0 else 0)
            if turn > 0:  # before that it is compiled, for a new state and for its own
                times[name].append(seconds)

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(times[over], times[under]))

    return {
        "fused": ratio("fused", "base"),
        "unfused": ratio("unfused", "base"),
        "training": ratio("full", "lora"),
        **sizes,
        "seconds": times,
    }


def _sampling(net: UNet, base: Any, deltas: Any, x: Any, cond: Any) -> dict[str, Callable]:
    schedule = schedules.RectifiedFlow()
    solver = ddim(uniform(schedule, STEPS))
    keys = sampling.image_keys(0, range(len(x)))
    deltas = {f"network/{path}": delta for path, delta in deltas.items()}

    def draw(params: Any) -> Any:
        def network(x: Any, time: Any, cond: Any) -> Any:
            return net.apply({"params": params}, x, time, cond)

        model = denoiser.denoiser(network, predictions.flow, denoiser.thousand_t)
        return sampling.sample(lambda x, at: model(x, at, cond), solver, keys, x.shape[1:])

    plain = jax.jit(draw)
    unfused = jax.jit(
        lambda params, deltas, w: draw(merge({"network": params}, [(deltas, w)])["network"])
    )
    fused = jax.jit(merge)({"network": base}, [(deltas, 0.8)])["network"]
    return {
        "base": lambda: plain(base),
        "fused": lambda: plain(fused),
        "unfused": lambda: unfused(base, deltas, 0.8),
    }


def _training(
    net: UNet, base: Any, adapter: Any, x: Any, cond: Any
) -> tuple[dict[str, Callable], dict[str, float]]:
    parts = net, schedules.RectifiedFlow(), predictions.flow, denoiser.thousand_t
    whole = Denoising(*parts)
    batch = {"x": x, "context": cond.context}
    averages = {"ema": ema.constant(0.999)}
    update = optimizers.make("adamw", 1e-4, weight_decay=1e-2)
    layout, runs, bytes_of, counts = parallel.make("pmap"), {}, {}, {}
    for name, objective, frozen in (
        ("full", whole, None),
        ("lora", Adapting(whole, adapter, net), {BASE: base}),
    ):
        step = make_train_step(objective, update, averages)
        state = create(objective, update, averages, jax.random.key(0), batch)
        bytes_of[name] = sum(a.nbytes for a in jax.tree.leaves(state.opt_state))
        counts[name] = sum(a.size for a in jax.tree.leaves(state.params))
        kept = [state]
        placed, key = parallel.place(layout, (frozen, jax.random.key(1)))

        def run(step=step, kept=kept, placed=placed, key=key) -> Any:
            kept[0], metrics = step(kept[0], placed, parallel.place_batch(layout, batch), key)
            return metrics

        runs[name] = run
    sizes = {
        "state": bytes_of["lora"] / bytes_of["full"],
        "parameters": counts["lora"] / counts["full"],
    }
    return runs, sizes


def _seconds(run: Callable, least: float) -> float:
    """Of one call, over as many as take ``least`` seconds."""
    count, began = 0, time.perf_counter()
    while not count or time.perf_counter() - began < least:
        jax.block_until_ready(run())
        count += 1
    return (time.perf_counter() - began) / count


if __name__ == "__main__":
    main()
