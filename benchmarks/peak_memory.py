"""Peak memory of a training step, measured, and the largest batch that fits.

    python benchmarks/peak_memory.py

prints a table and writes runs/benchmarks/peak_memory.json. The cases of networks.py, training with
AdamW and an average: every measurement is a fresh process that takes three steps. On a CPU its peak
resident memory counts, which includes the libraries; on a GPU the largest amount that the library's
allocator had given out. Two batches give the memory per example, and so the largest batch for a
device's memory (on a CPU: for 16 GiB). On a GPU that batch is then tried, and smaller ones if it
fails. (memory.py counts without a device, also for layouts over several devices.)
"""

from __future__ import annotations

import subprocess
from typing import Any

import report
import worker

COLUMNS = {
    "case": "network",
    "side": "",
    "batch": "batch",
    "gib": "peak [GiB]",
    "per_example": "per example [MiB]",
    "largest": "largest batch",
    "capacity": "in [GiB]",
    "tried": "tried",
    "failed": "failed",
}
USED = 0.93  # of a device's memory
CPU_GIB = 16


def main() -> None:
    arguments = report.arguments(__doc__, "peak_memory").parse_args()
    with report.Report(arguments, COLUMNS, "torch", "diffusers") as output:
        sides = worker.sides(arguments, output.note)
        for case, request in worker.requests("networks", arguments):
            if not case.train:
                continue
            kinds = {"here": ("jax", "step")}
            for name in case.variants:
                if report.has_gpu():
                    kinds[f"here, {name}"] = ("jax", f"step:{name}")
            if "torch" in sides:
                kinds["eager"] = ("torch", "step:eager")
                if report.has_gpu():
                    kinds["compiled"] = ("torch", "step:compile")
            for kind, (side, command) in kinds.items():
                if kind in arguments.skip.split(";") or output.late(f"{case.name}, {kind}"):
                    continue
                found = measured(side, command, request, case.batch)
                output.add({"case": case.name, "side": kind} | found)


def measured(side: str, command: str, request: dict[str, Any], batch: int) -> dict[str, Any]:
    """Peaks at two batches, one four times the other, and the largest batch that follows."""
    if not report.has_gpu():  # whose libraries and compilers take more than a small batch
        batch *= 4
    low = max(1, batch // 4)
    try:
        peaks = {size: peak(side, command, request, size) for size in (low, batch)}
    except worker.Failed as failure:
        return {"batch": batch, "failed": str(failure)[:200]}
    slope = (peaks[batch] - peaks[low]) / (batch - low)
    if slope < 2**10:  # an example takes less than the difference between processes
        return {"batch": batch, "gib": peaks[batch] / 2**30}
    capacity = USED * capacity_gib() * 2**30 if report.has_gpu() else CPU_GIB * 2**30
    largest = int((capacity - peaks[batch]) / slope) + batch
    found = {
        "batch": batch,
        "gib": peaks[batch] / 2**30,
        "per_example": slope / 2**20,
        "largest": largest,
        "capacity": capacity / 2**30,
    }
    return found | (tried(side, command, request, largest) if report.has_gpu() else {})


def peak(side: str, command: str, request: dict[str, Any], batch: int) -> int:
    """Bytes of three steps in a fresh process."""
    with worker.Worker(side, request | {"batch": batch}) as process:
        process.ask("run", command, times=3)
        return process.ask("peak")


def tried(side: str, command: str, request: dict[str, Any], largest: int) -> dict[str, Any]:
    """The largest batch that works, of three tries from the expected one downwards."""
    for factor in (1.0, 0.9, 0.8):
        size = max(1, int(largest * factor))
        try:
            peak(side, command, request, size)
            return {"tried": f"{size} fits"}
        except worker.Failed:
            continue
    return {"tried": f"{size} does not fit"}


def capacity_gib() -> float:
    """Of the GPU."""
    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True)
    return float(done.stdout.split()[0]) / 1024


if __name__ == "__main__":
    main()
