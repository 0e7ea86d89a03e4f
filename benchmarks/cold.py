"""Cold start: from the command to the first training step, and to the first image.

    python benchmarks/cold.py

prints a table and writes runs/benchmarks/cold.json. Our side is the command that a user types,
``python main.py --config=configs/digits.py``; beside it runs ``plain_torch.py``, the same as a
plain PyTorch script, eager and compiled. Seconds from the start of the process until it reports its
first step, or until its end, when it has drawn and written 16 images from a checkpoint. "cold"
starts with an empty cache of compiled code, "warm" with the cache of the run before. Sides take
turns; the table gives medians.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import report
import worker

MAIN = [sys.executable, "main.py", "--config=configs/digits.py"]
PLAIN = [sys.executable, "benchmarks/plain_torch.py"]
ROOT = Path(__file__).parent.parent
LIMIT = 600
COLUMNS = {
    "what": "",
    "cache": "compiled code",
    "ours": "here [s]",
    "eager": "PyTorch, eager",
    "compile": "PyTorch, compiled",
    "ratio": "best PyTorch / here",
}


def main() -> None:
    parser = report.arguments(__doc__, "cold")
    arguments = parser.parse_args()
    with report.Report(arguments, COLUMNS, "torch", "diffusers", "grain") as output:
        sides = worker.sides(arguments, output.note)
        with tempfile.TemporaryDirectory() as folder:
            for row in rows(Path(folder), sides, arguments, output.log):
                output.add(row)


def rows(folder: Path, sides: list[str], arguments: Any, log: Any) -> list[dict[str, Any]]:
    """The first step, then the first image; each cold and warm."""
    kinds = ["ours"] + (["eager", "compile"] if "torch" in sides else [])
    kinds = kinds[: 2 if arguments.small else 3]
    kinds = [kind for kind in kinds if kind not in arguments.skip.split(";")]
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for turn in range(arguments.repetitions):
        for kind in kinds:
            if kind == "compile" and turn >= max(1, arguments.repetitions // 2):
                continue  # it takes long
            for what in ("first step",) if arguments.small else ("first step", "first image"):
                cache = (
                    folder / f"{kind}-{what.split()[1]}-{turn}"
                )  # without spaces, which some compilers do not accept
                for state in ("cold", "warm"):
                    command, until = commands(kind, what, folder)
                    seconds = seconds_until(command, until, environment(cache))
                    found.setdefault((what, state), {}).setdefault(kind, []).append(seconds)
                    log(f"{what}, {state}, {kind}: {seconds:.3g} s")
                if (
                    turn == 0 and what == "first step" and not arguments.small
                ):  # whole, for the images' weights
                    command, _ = commands(kind, "weights", folder)
                    seconds_until(command, None, environment(cache))
    done = []
    for (what, state), times in found.items():
        row = {kind: statistics.median(all_) for kind, all_ in times.items()}
        theirs = [row[kind] for kind in ("eager", "compile") if kind in row]
        ratio = {"ratio": min(theirs) / row["ours"]} if theirs and "ours" in row else {}
        done.append({"what": what, "cache": state} | row | ratio | {"all": times})
    return done


def commands(kind: str, what: str, folder: Path) -> tuple[list[str], str | None]:
    """The command, and the words that end the measurement; None: the end of the process."""
    if kind == "ours":
        workdir = folder / "ours"
        short = ["--config.train.steps=2", "--config.optimizer.warmup=0"]
        if what == "first step":
            fresh = tempfile.mkdtemp(dir=folder)
            return [*MAIN, f"--workdir={fresh}"], "first step"
        if what == "weights":
            short += ["--config.evaluation.count=50", "--config.evaluation.metrics=()"]
            return [*MAIN, f"--workdir={workdir}", *short], None
        options = ["--mode=sample", "--config.samples.count=16"]
        return [*MAIN[:2], f"--workdir={workdir}", *options], None
    weights, image = str(folder / "plain.pt"), str(folder / "plain.png")
    options = ["--compile"] if kind == "compile" else []
    if what == "first step":
        return [*PLAIN, "train", weights, "--steps=1000", *options], "first step"
    if what == "weights":
        return [*PLAIN, "train", weights, *options], None
    return [*PLAIN, "sample", weights, image, *options], None


def environment(cache: Path) -> dict[str, str]:
    """Caches of compiled code in a folder of their own."""
    return {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def seconds_until(command: list[str], until: str | None, variables: dict[str, str]) -> float:
    """Seconds from the start of the process to a line with these words, or to its end."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    timer = threading.Timer(LIMIT, process.kill)
    timer.start()
    last = []
    try:
        for line in process.stdout:
            last = [*last[-20:], line]
            if until is not None and until in line:
                return time.perf_counter() - began
        if process.wait() == 0 and until is None:
            return time.perf_counter() - began
    finally:
        timer.cancel()
        process.kill()
        process.wait()
    raise SystemExit(f"{' '.join(command)} failed:\n{''.join(last)}")


if __name__ == "__main__":
    main()
