"""A tiny run in one of several processes: ``processes_run.py WORKDIR PORT ID KILL_AT``.

Trains first under pmap, then under fsdp, in WORKDIR/pmap and WORKDIR/fsdp. Process 1 is killed
within step KILL_AT of the second.
"""

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from linear_run import EMAS, angles

from diffusion.training import loop, optimizers, processes

WIDTH = 128  # so that fsdp cuts the matrix


class Network(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(WIDTH)(x)))[:, 0]


@dataclass(frozen=True)
class Regression:
    """Noisy regression with a linen network."""

    def init(self, key, batch):
        return Network().init(key, batch["x"])["params"]

    def loss(self, params, frozen, batch, key, train=True):
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


def run(workdir, parallel, steps, hooks=(), **changes):
    settings = dict(
        objective=Regression(),
        optimizer=optimizers.make("sgd", 0.05, b1=0.5),
        emas=EMAS,
        batches=batches,
        steps=steps,
        workdir=Path(workdir) / parallel,
        log_every=1,
        checkpoint_every=4,
        hooks=hooks,
        parallel=parallel,
    )
    return loop.fit(**(settings | changes))


def main(workdir, port, process_id, kill_at):
    processes.join(f"127.0.0.1:{port}", 2, int(process_id), timeout=60, heartbeat=10)

    def kill(state, step):
        if step == int(kill_at) and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    run(workdir, "pmap", 10)
    run(workdir, "fsdp", 10, hooks=[(1, kill)])


if __name__ == "__main__":
    main(*sys.argv[1:])
