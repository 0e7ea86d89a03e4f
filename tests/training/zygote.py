"""Runs that are killed, each in a process of its own that need not import anything.

This process imports everything and touches no device. For each line of JSON on its input,
{"workdir": ..., "path": ..., "event": n, "seconds": s, "by": 9}, it forks one that trains as
``linear_run.run`` does, of two networks with an optimiser each, and answers with
{"status": how it ended, "seconds": ..., "counts": ...}.
An event is an operation of Python's on a file of the workdir. The signal comes right before the
n-th whose path contains ``path``, or after so many seconds, wherever the process is then; counts
are of such events by the paths in ``PATHS``.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from linear_run import EMAS, Rivals, run

from diffusion.runs import snapshots

STEPS = 14
PATHS = ("", "metrics.jsonl", "snapshots/", "checkpoints/", "lock")
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate")


def train(workdir, path=None, event=0, by=signal.SIGKILL):
    counts = dict.fromkeys(PATHS, 0)

    def watch(operation, arguments):
        if operation not in OPERATIONS or not str(arguments[0]).startswith(workdir):
            return
        if operation == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):
            return
        for name in PATHS:
            counts[name] += name in str(arguments[0])
        if path is not None and path in str(arguments[0]) and counts[path] == event:
            os.kill(os.getpid(), by)

    sys.addaudithook(watch)
    state = run(
        workdir,
        STEPS,
        objective=Rivals(),
        emas={"power": EMAS["power"]} | snapshots.profiles((0.1,)),
        checkpoint_every=4,
        keep=2,
        keep_best=1,
        best="mae",
        hooks=[(5, snapshots.writer(workdir, 5, (0.1,)))],
    )
    arrays = {f"params_{name}": value for name, value in state.params.items()}
    arrays |= {f"ema_{name}": value for name, value in state.ema["power"].items()}
    arrays["extra"] = state.extra["params"]["a"]
    arrays["moments"] = state.extra["opt_state"][0].nu["a"]
    np.savez(Path(workdir) / "result.npz", **arrays)
    return counts


def fork(workdir, seconds=None, **kill):
    read, write = os.pipe()
    began = time.perf_counter()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.dup2(2, 1)  # its words are not answers
            os.write(write, json.dumps(train(workdir, **kill)).encode())
            status = 0
        except SystemExit as stopped:
            status = stopped.code
        finally:
            sys.stderr.flush()
            os._exit(status)
    os.close(write)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with os.fdopen(read) as file:
        counts = json.loads(file.read() or "{}")
    return {"status": status, "seconds": time.perf_counter() - began, "counts": counts}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(fork(**json.loads(line))), flush=True)
