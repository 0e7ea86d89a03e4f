"""U-Nets and DiTs: a forward pass and a training step, here and in diffusers.

    python benchmarks/networks.py

prints a table and writes runs/benchmarks/networks.json. Both sides have the same weights and inputs
and all cores (or the GPU): theirs eager, eager with channels_last, and compiled by torch.compile.
A training step is loss, gradients, AdamW and an average; ours is ``make_train_step``, beside a step
written by hand ("bare") that shows what the first costs more. They take turns, each in a waiting
process of its own; medians over turns. Utilisation is counted FLOPs (of training three times those
of a forward pass, recomputation not counted) over the time and the largest matrix product's rate,
measured in between. Float32 on a CPU; bfloat16 on a GPU, where parameters in training are float32.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import report
import worker

COLUMNS = {
    "case": "network",
    "batch": "batch",
    "what": "",
    "ours": "here [ms]",
    "bare": "bare JAX",
    "eager": "eager",
    "channels_last": "channels_last",
    "compile": "compiled",
    "ratio": "best PyTorch / here",
    "utilisation": "here, of the peak [%]",
    "theirs_utilisation": "PyTorch [%]",
    "difference": "outputs differ by",
}


def main() -> None:
    parser = report.arguments(__doc__, "networks")
    parser.add_argument("--does", default="forward,train", help="what is measured")
    parser.add_argument("--apart", action="store_true", help="one side after the other")
    arguments = parser.parse_args()
    with report.Report(arguments, COLUMNS, "diffusers", "torch", "triton") as told:
        measure("networks", arguments, told)


def measure(which: str, arguments: argparse.Namespace, told: report.Report) -> None:
    """Rows of every case of a list in ``workloads``."""
    sides = worker.sides(arguments, told.note)
    for case, request in worker.requests(which, arguments):
        does = [what for what in ("forward", "train") if getattr(case, what)]
        does = [what for what in does if what in arguments.does]
        if does and not told.late(f"{case.name}, batch of {case.batch}"):
            turns = [[side] for side in sides] if arguments.apart else [sides]
            rows(case, request, does, turns, arguments, told)


def rows(
    case: Any,
    request: dict[str, Any],
    does: list[str],
    turns: list[list[str]],
    arguments: argparse.Namespace,
    told: report.Report,
) -> None:
    """A row for the forward pass, one for the training step; sides of one turn alternate."""
    found: dict[str, dict[str, Any]] = {what: {} for what in does}
    peaks, outputs, flops = {}, {}, 0
    product = 2 * worker.matmul_size(report.has_gpu()) ** 3
    for together in turns:
        workers = {side: worker.Worker(side, request) for side in together}
        try:
            told.log(f"{case.name}, batch of {request['batch'] or case.batch}")
            if "jax" in workers:
                flops = workers["jax"].ask("flops")
            for what in does:
                names = commands(case, what, together)
                names = {k: v for k, v in names.items() if not skipped(k, arguments)}
                rulers = {f"matmul, {side}": (side, "matmul") for side in together}
                times = worker.alternate(
                    workers, rulers | names, arguments.repetitions, arguments.seconds, told, rulers
                )
                for name, (side, _) in rulers.items():
                    fastest = min(times.pop(name, {}).get("all", [math.inf]))
                    peaks[side] = max(peaks.get(side, 0.0), product / fastest)
                found[what] |= times
                told.add(row(case, request, what, found[what], peaks, flops, {}))
                checked = {"forward": "forward", "train": "check"}[what]
                for side in together:
                    variant = ":eager" if side == "torch" else ""
                    outputs[what, side] = output_of(workers[side], checked + variant, told.log)
                compared = {side: outputs.get((what, side)) for side in ("jax", "torch")}
                told.add(row(case, request, what, found[what], peaks, flops, compared))
        finally:
            worker.close_all(workers)


def commands(case: Any, what: str, sides: list[str]) -> dict[str, tuple[str, str]]:
    """Name in the results -> (side, the worker's command)."""
    found = {}
    if "jax" in sides:
        name = "forward" if what == "forward" else "step"
        found["ours"] = ("jax", name)
        if what == "train":
            found["bare"] = ("jax", "bare")
        for variant, fields in case.variants.items():
            if what == "train" or "remat" not in fields:
                found[f"ours, {variant}"] = ("jax", f"{name}:{variant}")
    if "torch" in sides:
        name = "forward" if what == "forward" else "step"
        found["eager"] = ("torch", f"{name}:eager")
        if type(case.network).__name__ != "DiT" and not report.has_gpu():
            found["channels_last"] = ("torch", f"{name}:channels_last")
        found["compile"] = ("torch", f"{name}:compile")
    return {name: command for name, command in found.items() if name not in case.without}


def skipped(name: str, arguments: argparse.Namespace) -> bool:
    """Whether the command line leaves a variant out."""
    return any(word and word in name for word in arguments.skip.split(";"))


def row(
    case: Any,
    request: dict[str, Any],
    what: str,
    found: dict[str, dict[str, Any]],
    peaks: dict[str, float],
    flops: int,
    outputs: dict[str, Any],
) -> dict[str, Any]:
    """Medians in milliseconds, what follows from them, and all single times."""
    told = {"case": case.name, "batch": request["batch"] or case.batch, "what": what}
    seconds = {name: one["seconds"] for name, one in found.items() if "seconds" in one}
    told |= {name: 1e3 * value for name, value in seconds.items()}
    ours = {n: s for n, s in seconds.items() if n.startswith("ours")}
    theirs = {n: s for n, s in seconds.items() if n in ("eager", "channels_last", "compile")}
    work = flops * (3 if what == "train" else 1)
    told |= {"gflop": work / 1e9, "peak_tflops": {side: p / 1e12 for side, p in peaks.items()}}
    rate = max(peaks.values(), default=0.0) or math.nan
    if ours:
        best = min(ours, key=ours.get)
        told |= {"best": best, "utilisation": 100 * work / ours[best] / rate}
        told["examples_per_second"] = told["batch"] / ours[best]
    if theirs:
        best = min(theirs, key=theirs.get)
        told |= {"best_theirs": best, "theirs_utilisation": 100 * work / theirs[best] / rate}
    if ours and theirs:
        told["ratio"] = min(theirs.values()) / min(ours.values())
    if "bare" in seconds and "ours" in seconds:
        told["overhead"] = 100 * (seconds["ours"] / seconds["bare"] - 1)
    if outputs and all(value is not None for value in outputs.values()):
        told["difference"] = worker.difference(outputs["jax"], outputs["torch"])
    return told | {"runs": found}


def output_of(process: worker.Worker, command: str, log: Any) -> Any:
    """What it computes, or None if that fails."""
    try:
        process.ask("free")
        output = process.output(command)
        process.ask("free")
        return output
    except worker.Failed as failure:
        log(f"  {command}: {failure}")
        return None


if __name__ == "__main__":
    main()
