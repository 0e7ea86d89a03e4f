"""A tiny run of one or several processes, for the tests.

As a script it is one of two processes: ``processes_run.py first|second WORKDIR PORT ID``. First,
both train STEPS steps under fsdp in WORKDIR/fsdp, where process 1 is killed; second, they go on
there, and train under pmap in WORKDIR/pmap, with a SIGTERM to process 1 in between.
"""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from linear_run import EMAS, angles

from diffusion import processes
from diffusion.training import loop, optimizers

STEPS = 10
WIDTH = 128  # so that fsdp cuts the matrix
SGD = optimizers.make("sgd", 0.05, b1=0.5)  # which shows a gradient that is too large


class Network(nn.Module):
    """One hidden layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.tanh(nn.Dense(WIDTH)(x))
        return nn.Dense(1)(x)[:, 0]


@dataclass(frozen=True)
class Regression:
    """Noisy regression."""

    def init(self, key, batch):
        return Network().init(key, batch["x"])["params"]

    def loss(self, params, context, batch, key):
        noise = angles(key, 3 * batch["index"][:, None] + jnp.arange(WIDTH))
        y = Network().apply({"params": params}, batch["x"] + 0.2 * noise)
        return jnp.mean((y - batch["y"]) ** 2), {"mean": jnp.mean(y)}


def batch_of(step, size=8):
    x = np.random.default_rng(step).normal(size=(size, WIDTH)).astype(np.float32)
    return {"x": x, "y": x[:, 0], "index": np.arange(size, dtype=np.int32)}


def batches(start):
    """This process's share of each batch."""
    count, own = jax.process_count(), jax.process_index()
    for step in range(start, 10**9):
        yield {name: np.split(x, count)[own] for name, x in batch_of(step).items()}


def run(workdir, parallel, **changes):
    settings = dict(
        objective=Regression(),
        optimizer=SGD,
        emas=EMAS,
        batches=batches,
        steps=STEPS,
        workdir=workdir,
        log_every=1,
        checkpoint_every=4,
        parallel=parallel,
    )
    return loop.fit(**(settings | changes))


def at(step, process, act):
    """A hook that acts in one step of one process."""

    def hook(state, done):
        if done == step and jax.process_index() == process:
            act()

    return [(1, hook)]


def first(workdir):
    def kill():
        while not (workdir / "fsdp" / "checkpoints" / "4").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    run(workdir / "fsdp", "fsdp", hooks=at(6, 1, kill))


def second(workdir):
    state = run(workdir / "fsdp", "fsdp")
    average = processes.local(state.ema["power"])
    if jax.process_index() == 0:
        np.savez(workdir / "average.npz", *jax.tree.leaves(average))
    else:
        time.sleep(1)  # one is done later than the other: they wait for each other
    try:
        run(workdir / "pmap", "pmap", hooks=at(5, 1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    except SystemExit as stopped:
        print(f"stopped with {stopped.code}", flush=True)
    run(workdir / "pmap", "pmap")


if __name__ == "__main__":
    which, workdir, port, process_id = sys.argv[1:]
    processes.join(f"127.0.0.1:{port}", 2, int(process_id))
    {"first": first, "second": second}[which](Path(workdir))
