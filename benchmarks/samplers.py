"""Samplers end to end around real networks: one compiled scan, and diffusers' Python loop.

    python benchmarks/samplers.py

prints a table and writes runs/benchmarks/samplers.json. Both sides have the same weights, noise and
steps; guided ones evaluate a batch of two. A sampler is responsible for the time outside the
network: the time of the whole less that of as many bare calls of the same network, divided by the
time of the whole. All calls of both sides take turns; the table gives medians.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import report
import worker

COLUMNS = {
    "case": "network and sampler",
    "batch": "batch",
    "steps": "steps",
    "ours": "here [ms/step]",
    "outside": "outside the network [%]",
    "eager": "eager [ms/step]",
    "channels_last": "channels_last",
    "compile": "compiled",
    "theirs_outside": "outside the network [%] ",
    "ratio": "best PyTorch / here",
    "difference": "outputs differ by",
}
THEIRS = ("eager", "channels_last", "compile")


def main() -> None:
    arguments = report.arguments(__doc__, "samplers").parse_args()
    with report.Report(arguments, COLUMNS, "diffusers", "torch", "triton") as output:
        sides = worker.sides(arguments, output.note)
        for case, request in worker.requests("samplers", arguments):
            if output.late(case.name):
                continue
            workers = {side: worker.Worker(side, request) for side in sides}
            try:
                output.log(case.name)
                found = worker.alternate(
                    workers,
                    commands(sides, [*arguments.skip.split(";"), *case.without]),
                    arguments.repetitions,
                    arguments.seconds,
                    output,
                )
                output.add(row(case, found, workers))
            finally:
                worker.close_all(workers)


def commands(sides: list[str], skip: list[str]) -> dict[str, tuple[str, str]]:
    """Name -> (side, command): every sampler, and as many bare calls of its network."""
    names = {"ours": ("jax", "")}
    if "torch" in sides:
        kinds = [kind for kind in THEIRS if kind != "channels_last" or not report.has_gpu()]
        names |= {kind: ("torch", f":{kind}") for kind in kinds if kind not in skip}
    found = {}
    for name, (side, variant) in names.items():
        found[name] = (side, f"sample{variant}")
        found[f"{name}, network"] = (side, f"calls{variant}")
    return found


def row(
    case: Any, found: Mapping[str, Mapping[str, Any]], workers: Mapping[str, worker.Worker]
) -> dict[str, Any]:
    """Milliseconds a step, and shares outside the network."""
    steps = case.settings["steps"]
    result = {"case": case.name, "batch": case.batch, "steps": steps}
    seconds = {name: one["seconds"] for name, one in found.items() if "seconds" in one}
    result |= {name: 1e3 * s / steps for name, s in seconds.items() if "network" not in name}
    result["networks"] = {n: 1e3 * s / steps for n, s in seconds.items() if "network" in n}
    if {"ours", "ours, network"} <= seconds.keys():
        result["outside"] = outside(found, "ours")
    theirs = [kind for kind in THEIRS if kind in seconds]
    if theirs:
        best = min(theirs, key=seconds.get)
        result |= {"best_theirs": best, "theirs_outside": outside(found, best)}
        result["ratio"] = seconds[best] / seconds["ours"]
        outputs = [workers["jax"].output("sample"), workers["torch"].output(f"sample:{theirs[0]}")]
        result["difference"] = worker.difference(*outputs)
    return result | {"runs": found}


def outside(found: Mapping[str, Mapping[str, Any]], name: str) -> float:
    """Percent: the median over turns of 1 - network / whole."""
    pairs = zip(found[name]["all"], found[f"{name}, network"]["all"])
    shares = sorted(100 * (1 - network / whole) for whole, network in pairs)
    return shares[len(shares) // 2]


if __name__ == "__main__":
    main()
