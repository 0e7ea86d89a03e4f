"""Two processes that take turns, one per side, so that neither disturbs the other's threads.

``Worker`` starts this file as a process for a case, and asks it for timed runs; ``alternate`` takes
all variants of both sides in turn. A variant that is far behind the
best of its side after two turns gets no further turns.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

import report

SIDES = {"jax": "ours", "torch": "theirs"}
BEHIND = 1.4  # times as slow as the best of the side


class Failed(RuntimeError):
    """A command failed, for example for lack of memory; holds its message."""


class Worker:
    """A side's process for one case, which does one command at a time.

    Args:
      side: "jax" or "torch".
      request: {"list": "networks", "index": 0, "gpu": False, "small": False, "batch": None,
        "settings": {...}}: which case.
      environment: further variables, such as XLA_FLAGS.
    """

    def __init__(
        self, side: str, request: Mapping[str, Any], environment: Mapping[str, str] | None = None
    ):
        self.side = side
        own = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TRANSFORMERS_VERBOSITY": "error"}
        if side == "torch":
            own["JAX_PLATFORMS"] = "cpu"
            own["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        self.folder = tempfile.TemporaryDirectory()
        self.process = subprocess.Popen(
            [sys.executable, __file__, side, json.dumps(dict(request))],
            env={**os.environ, **own, **(environment or {})},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def ask(self, do: str, command: str = "", **arguments: Any) -> Any:
        """The process's answer; raises ``Failed`` if the command failed."""
        try:
            print(json.dumps({"do": do, "command": command, **arguments}), file=self.process.stdin)
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"failed": f"{self.side}'s process ended"}
        if "failed" in answer:
            raise Failed(answer["failed"])
        return answer["answer"]

    def output(self, command: str) -> Any:
        """What the command computes, as an array."""
        import numpy as np

        path = str(Path(self.folder.name) / "output.npy")
        self.ask("save", command, path=path)
        return np.load(path)

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()
        self.folder.cleanup()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def alternate(
    workers: Mapping[str, Worker],
    commands: Mapping[str, tuple[str, str]],
    repetitions: int,
    seconds: float,
    output: report.Report,
    rulers: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """Seconds per call of every command, taken in turn.

    Args:
      workers: by side.
      commands: name -> (side, the worker's command).
      repetitions: turns.
      seconds: a turn lasts about so long, of many calls if they are short.
      output: reports every command; when its time is over, the remaining commands are skipped.
      rulers: names of commands that are not variants, and get all turns.

    Returns:
      name -> {"seconds": median, "all": [...], "compile": seconds of the first call}, or {"failed":
      reason}.
    """
    found: dict[str, dict[str, Any]] = {}
    calls: dict[str, int] = {}
    log = output.log
    for name, (side, command) in commands.items():
        if calls and output.late(name):
            continue
        try:
            first = workers[side].ask("run", command, times=1)
            second = workers[side].ask("run", command, times=1)
            third = second if second > seconds else workers[side].ask("run", command, times=2) / 2
            calls[name] = max(1, math.ceil(seconds / third))
            found[name] = {"compile": first - third, "all": []}
            log(f"  {name}: {_short(third)}, first call {first:.3g} s")
        except Failed as failure:
            found[name] = {"failed": str(failure)}
            log(f"  {name}: failed: {failure}")
    alive = list(calls)
    for turn in range(repetitions):
        for name in alive:
            side, command = commands[name]
            time.sleep(0.02)  # the other side's threads go to sleep
            try:
                taken = workers[side].ask("run", command, times=calls[name])
            except Failed as failure:  # the process ended, for example for lack of memory
                log(f"  {name}: failed: {failure}")
                continue
            found[name]["all"].append(taken / calls[name])
        alive = [n for n in alive if len(found[n]["all"]) > turn]
        if turn == 1:
            variants = [n for n in alive if n not in rulers]
            best = {
                side: min(min(found[n]["all"]) for n in variants if commands[n][0] == side)
                for side in {commands[n][0] for n in variants}
            }
            behind = {n for n in variants if min(found[n]["all"]) >= BEHIND * best[commands[n][0]]}
            alive = [n for n in alive if n not in behind]
    for name in calls:
        if not found[name]["all"]:
            continue
        found[name]["seconds"] = statistics.median(found[name]["all"])
        found[name]["calls"] = calls[name]
    return found


def close_all(workers: Mapping[str, Worker]) -> None:
    """Ends the processes."""
    for worker in workers.values():
        worker.close()


def sides(arguments: Any, note: Any) -> list[str]:
    """The sides that can be measured here; notes why one is missing."""
    missing = [name for name in ("torch", "diffusers") if importlib.util.find_spec(name) is None]
    if "torch" in arguments.skip.split(";"):
        return ["jax"]
    if missing:
        note(f"no {' and no '.join(missing)} here: our side alone")
        return ["jax"]
    return ["jax", "torch"]


def requests(which: str, arguments: Any) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The cases of a list in ``workloads`` that the command line asks for, and their requests."""
    import workloads

    gpu, only = report.has_gpu(), arguments.only.split(";")
    for index, case in enumerate(getattr(workloads, which)(gpu, arguments.small)):
        if any(word in f"{case.name}, batch {case.batch}" for word in only):
            request = {"list": which, "index": index, "gpu": gpu, "small": arguments.small}
            yield case, request | {"batch": arguments.batch or None, "settings": case.settings}


def matmul_size(gpu: bool) -> int:
    """Rows of the matrices whose product gives the device's peak."""
    return 8192 if gpu else 2048


def host_peak() -> int:
    """Bytes of this process's memory, at most.

    ``getrusage`` does not serve: there a new process starts with the peak of its parent.
    """
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1])


def difference(one: Any, other: Any) -> float:
    """||a - b|| / ||b||."""
    import numpy as np

    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


def _short(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms"


def case_of(request: Mapping[str, Any]) -> Any:
    """The case that a request names."""
    import dataclasses

    import workloads

    found = getattr(workloads, request["list"])(request["gpu"], request["small"])[request["index"]]
    own = {name: request[name] for name in ("batch", "settings") if request.get(name)}
    return dataclasses.replace(found, **own)


def server(side: str, request: Mapping[str, Any]) -> Callable[[Mapping[str, Any]], Any]:
    """The function that answers a side's commands about a case."""
    module = importlib.import_module(SIDES[side])
    measured = module.Side(case_of(request))
    made: dict[str, Any] = {}

    def answer(message: Mapping[str, Any]) -> Any:
        do, command = message["do"], message["command"]
        if do == "flops":
            return measured.case.flops()
        if do == "peak":
            return measured.peak()
        if do == "free":
            made.clear()
            measured.free()
            gc.collect()
            return None
        if command not in made:
            made[command] = measured.make(command)
        if do == "save":
            import numpy as np

            return np.save(message["path"], module.to_numpy(made[command]()))
        began = time.perf_counter()
        for _ in range(message["times"]):
            output = made[command]()
        module.wait(output)
        return time.perf_counter() - began

    return answer


def work(side: str, request: Mapping[str, Any], lines: Iterable[str], answers: TextIO) -> None:
    """The work of a side's process: it answers commands until there are no more."""
    if side == "jax":
        from diffusion import compiler

        compiler.tune()
    answer = server(side, request)
    for line in lines:
        try:
            reply = {"answer": answer(json.loads(line))}
        except Exception as error:
            traceback.print_exc(limit=-4)
            reply = {"failed": f"{type(error).__name__}: {str(error).strip().splitlines()[:1]}"}
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    replies, sys.stdout = sys.stdout, sys.stderr  # libraries print, too
    work(sys.argv[1], json.loads(sys.argv[2]), sys.stdin, replies)
