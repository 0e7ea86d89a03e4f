"""--mode=profile: where the time of a training step goes, from a trace of a few steps.

Operations are XLA's, after fusion; each is listed with the part of the model that it computes.
"""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.config.data import batches
from diffusion.config.experiment import Experiment, build
from diffusion.config.summary import peak
from diffusion.training import flops, parallel
from diffusion.training.meter import memory
from diffusion.training.state import create
from diffusion.training.step import make_train_step

SHOWN = 15
INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?([\w.\-]+) = ")
ORIGIN = re.compile(r'op_name="([^"]*)"')
CALLS = re.compile(r"calls=%?([\w.\-]+)")
HOW_TO_OPEN = """\
the trace: {trace}
  in a browser: https://ui.perfetto.dev, and there open the *.trace.json.gz in that folder
  or, as TensorBoard's profile plugin shows it: pip install xprof; xprof --logdir={folder}"""


def run(config: ConfigDict, workdir: str) -> None:
    """Traces ``config.profile.steps`` training steps, with the run's own data and step.

    They start from new parameters; what a run has left in ``workdir`` stays as it is. Each step is
    waited for, which training does not do, so that input and computing are measured apart.

    Leaves in ``workdir/profile``: plugins/ (the trace) and summary.json.
    """
    experiment, folder = build(config), Path(workdir) / "profile"
    folder.mkdir(parents=True, exist_ok=True)
    layout = parallel.make(config.parallel)
    step, state, frozen, key = _prepare(experiment, layout)
    data = batches(config, experiment.train, 0)
    batch = parallel.place_batch(layout, next(data))
    began = time.perf_counter()
    traced = step.trace(state, frozen, batch, key)
    compiled = traced.lower().compile()
    print(f"compiled in {time.perf_counter() - began:.1f} s")

    times, waits = [], []  # seconds of each traced step, of them waiting for the batch

    def run(state: Any) -> Any:
        began = time.perf_counter()
        batch = next(data)
        arrived = time.perf_counter()
        batch = parallel.place_batch(layout, batch)
        state, metrics = compiled(state, frozen, batch, key)
        jax.block_until_ready((state, metrics))
        times.append(time.perf_counter() - began)
        waits.append(arrived - began)
        return state

    for _ in range(config.profile.warmup):
        state = run(state)
    del times[:], waits[:]
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it slows the host down, and names no operation
    with jax.profiler.trace(folder, profiler_options=options):
        for i in range(config.profile.steps):
            with jax.profiler.StepTraceAnnotation("train", step_num=i):
                state = run(state)

    trace = max(folder.glob("plugins/profile/*/*.xplane.pb"), key=lambda path: path.stat().st_mtime)
    seconds, devices = float(np.median(times)), jax.local_devices()
    rate = flops.of(traced.jaxpr) / seconds
    summary = {
        "device": devices[0].device_kind,
        "devices": len(devices),
        "batch_size": config.train.batch_size,
        "steps": config.profile.steps,
        "step_seconds": seconds,
        "images_per_second": config.train.batch_size / seconds,
        "waiting_for_data": sum(waits) / sum(times),
        "teraflops_per_second": rate / 1e12,
    }
    if most := peak(config):
        summary["share_of_peak"] = rate / (most * len(devices))
    summary |= memory(devices) | _compiled_memory(compiled)
    count = config.profile.steps * len(devices)
    summary["operations"] = operations(trace, count, origins(compiled.as_text()))
    (folder / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    print(tell(summary))
    print(HOW_TO_OPEN.format(trace=trace.parent, folder=folder))


def operations(trace: Path, count: int, origin: dict[str, str]) -> list[dict[str, Any]]:
    """The ``SHOWN`` operations of a trace (.xplane.pb) with the longest total times, longest first.

    ``count`` is of steps times devices; ``origin`` is the part of the model, by operation.
    """
    seconds, calls = defaultdict(float), defaultdict(int)
    for events in _lines(jax.profiler.ProfileData.from_file(str(trace))):
        for name, own in _own_times(events):
            seconds[name] += own / 1e9
            calls[name] += 1
    total = sum(seconds.values())
    longest = sorted(seconds, key=seconds.get, reverse=True)[:SHOWN]
    return [
        {
            "name": name,
            "origin": origin.get(name, ""),
            "milliseconds_per_step": 1e3 * seconds[name] / count,
            "share": seconds[name] / total,
            "calls_per_step": calls[name] / count,
        }
        for name in longest
    ]


def origins(text: str) -> dict[str, str]:
    """Operation -> the part of the model that it computes, from a compiled program's text."""
    found, within, computation = {}, {}, ""
    for line in text.splitlines():
        instruction = INSTRUCTION.match(line)
        if instruction is None:
            if line.rstrip().endswith("{"):  # a computation begins
                computation = line.removeprefix("ENTRY").split()[0].lstrip("%")
            continue
        origin, calls = ORIGIN.search(line), CALLS.search(line)
        path = origin[1] if origin else within.get(calls[1]) if calls else None
        if path:
            found[instruction[1]] = re.sub(r"(jit|jit_|pjit)\([\w<>]*\)/", "", path)
            within[computation] = path  # the last one's: what a fusion gives
    return found


def tell(summary: dict[str, Any]) -> str:
    """The summary in words."""
    lines = [
        "a step of {batch_size} images takes {step_seconds:.4g} s on {devices} x {device}: "
        "{images_per_second:.4g} images/s, {teraflops_per_second:.3g} TFLOP/s, "
        "{waiting_for_data:.1%} waiting for data".format(**summary)
    ]
    if "share_of_peak" in summary:
        lines[0] += f", {summary['share_of_peak']:.1%} of the peak"
    sizes = [
        f"{name.removesuffix('_gib')} {summary[name]:.3g}" for name in summary if "_gib" in name
    ]
    lines.append(f"memory in GiB: {', '.join(sizes)}")
    lines.append("ms/step   share  calls  operation")
    for row in summary["operations"]:
        lines.append(
            "{milliseconds_per_step:7.3f}  {share:6.1%}  {calls_per_step:5.4g}  {name}  "
            "{origin}".format(**row).rstrip()[:140]
        )
    return "\n".join(lines)


def _prepare(experiment: Experiment, layout: parallel.Layout) -> tuple[Any, Any, Any, jax.Array]:
    """The training step and what it takes besides batches, as ``training.loop`` makes them."""
    config = experiment.config
    parts = experiment.objective, experiment.optimizer, experiment.emas
    init_key, key = jax.random.split(jax.random.key(config.seed))
    example = {name: np.asarray(value)[None] for name, value in experiment.train[0].items()}
    state = parallel.initialise(layout, lambda key: create(*parts, key, example), init_key)
    frozen, key = parallel.place(layout, (experiment.frozen, key))
    settings = {"accumulate": config.train.accumulate, "parallel": layout.name}
    return make_train_step(*parts, **settings), state, frozen, key


def _compiled_memory(compiled: Any) -> dict[str, float]:
    """What XLA plans for one device."""
    found = compiled.memory_analysis()
    if found is None:
        return {}
    sizes = {
        "state_and_batch_gib": found.argument_size_in_bytes,
        "intermediate_results_gib": found.temp_size_in_bytes,
    }
    return {name: size / 2**30 for name, size in sizes.items()}


def _lines(data: Any) -> Iterator[list[tuple[str, float, float]]]:
    """Operations as (name, start, duration in ns), a list per thread or stream of a device."""
    planes = list(data.planes)
    # GPUs and TPUs have planes of their own; of CPUs, operations are marked among the threads.
    on_device = [plane for plane in planes if plane.name.startswith("/device:")]
    for plane in on_device or planes:
        lines = list(plane.lines)
        named = [line for line in lines if line.name == "XLA Ops"]
        for line in named or lines:
            events = []
            for event in line.events:
                name = event.name if named else dict(event.stats).get("hlo_op")
                if name:
                    events.append((str(name), event.start_ns, event.duration_ns))
            yield events


def _own_times(events: Iterable[tuple[str, float, float]]) -> Iterator[tuple[str, float]]:
    """Each operation's duration without that of the operations within it (a loop's body)."""
    open_: list[list] = []  # [name, end, own], outermost first
    for name, start, duration in sorted(events, key=lambda e: (e[1], -e[2])):
        while open_ and open_[-1][1] <= start:
            done = open_.pop()
            yield done[0], done[2]
        if open_:
            open_[-1][2] -= min(duration, open_[-1][1] - start)
        open_.append([name, start + duration, duration])
    for name, _, own in open_:
        yield name, own
