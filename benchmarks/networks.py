"""U-Nets and DiTs: a forward pass and a training step, here and in diffusers.

    python benchmarks/networks.py

prints a table and writes runs/benchmarks/networks.json. Both sides have the same weights and inputs
and all cores (or the GPU): theirs eager, eager with channels_last, and compiled by torch.compile. A
training step is loss, gradients, AdamW and an average. Ours is ``make_train_step``; a step written
by hand ("bare") shows how much that costs. The sides take turns, each in a process of its own that
waits; the table gives medians over turns. Utilisation is the number of FLOPs (training: three times
a forward pass, without recomputation) divided by the time and by the rate of a large matrix
product, which takes its turn, too. Float32 on a CPU; bfloat16 on a GPU, where parameters in
training are float32.
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
    parser.add_argument("--does", default="forward,train", help="forward, train or both")
    parser.add_argument("--apart", action="store_true", help="one side after the other")
    arguments = parser.parse_args()
    with report.Report(arguments, COLUMNS, "diffusers", "torch", "triton") as output:
        measure("networks", arguments, output)


def measure(which: str, arguments: argparse.Namespace, output: report.Report) -> None:
    """Rows of every case of a list in ``workloads``."""
    sides = worker.sides(arguments, output.note)
    for case, request in worker.requests(which, arguments):
        does = [what for what in ("forward", "train") if getattr(case, what)]
        does = [what for what in does if what in arguments.does]
        if does and not output.late(f"{case.name}, batch of {case.batch}"):
            turns = [[side] for side in sides] if arguments.apart else [sides]
            rows(case, request, does, turns, arguments, output)


def rows(
    case: Any,
    request: dict[str, Any],
    does: list[str],
    turns: list[list[str]],
    arguments: argparse.Namespace,
    output: report.Report,
) -> None:
    """A row for the forward pass, one for the training step; sides of one turn alternate."""
    found: dict[str, dict[str, Any]] = {what: {} for what in does}
    peaks, outputs, flops = {}, {}, 0
    product = 2 * worker.matmul_size(report.has_gpu()) ** 3
    for together in turns:
        workers = {side: worker.Worker(side, request) for side in together}
        try:
            output.log(f"{case.name}, batch of {request['batch'] or case.batch}")
            if "jax" in workers:
                flops = workers["jax"].ask("flops")
            for what in does:
                names = commands(case, what, together)
                names = {k: v for k, v in names.items() if not skipped(k, arguments)}
                rulers = {f"matmul, {side}": (side, "matmul") for side in together}
                times = worker.alternate(
                    workers,
                    rulers | names,
                    arguments.repetitions,
                    arguments.seconds,
                    output,
                    rulers,
                )
                for name, (side, _) in rulers.items():
                    fastest = min(times.pop(name, {}).get("all", [math.inf]))
                    peaks[side] = max(peaks.get(side, 0.0), product / fastest)
                found[what] |= times
                output.add(row(case, request, what, found[what], peaks, flops, {}))
                checked = {"forward": "forward", "train": "check"}[what]
                for side in together:
                    variant = ":eager" if side == "torch" else ""
                    outputs[what, side] = output_of(workers[side], checked + variant, output.log)
                compared = {side: outputs.get((what, side)) for side in ("jax", "torch")}
                output.add(row(case, request, what, found[what], peaks, flops, compared))
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
    """Medians in milliseconds, the figures that follow from them, and all single times."""
    result = {"case": case.name, "batch": request["batch"] or case.batch, "what": what}
    seconds = {name: one["seconds"] for name, one in found.items() if "seconds" in one}
    result |= {name: 1e3 * value for name, value in seconds.items()}
    ours = {n: s for n, s in seconds.items() if n.startswith("ours")}
    theirs = {n: s for n, s in seconds.items() if n in ("eager", "channels_last", "compile")}
    work = flops * (3 if what == "train" else 1)
    result |= {"gflop": work / 1e9, "peak_tflops": {side: p / 1e12 for side, p in peaks.items()}}
    rate = max(peaks.values(), default=0.0) or math.nan
    if ours:
        best = min(ours, key=ours.get)
        result |= {"best": best, "utilisation": 100 * work / ours[best] / rate}
        result["examples_per_second"] = result["batch"] / ours[best]
    if theirs:
        best = min(theirs, key=theirs.get)
        result |= {"best_theirs": best, "theirs_utilisation": 100 * work / theirs[best] / rate}
    if ours and theirs:
        result["ratio"] = min(theirs.values()) / min(ours.values())
    if "bare" in seconds and "ours" in seconds:
        result["overhead"] = 100 * (seconds["ours"] / seconds["bare"] - 1)
    if outputs and all(value is not None for value in outputs.values()):
        result["difference"] = worker.difference(outputs["jax"], outputs["torch"])
    return result | {"runs": found}


def output_of(process: worker.Worker, command: str, log: Any) -> Any:
    """The output of a command, or None if it fails."""
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
