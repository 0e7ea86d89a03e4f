"""A tiny run for the tests: a linear model, whose data and noise depend on the step alone."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import ema
from diffusion.training import loop, optimizers
from diffusion.training.meter import OF_THE_MACHINE


def angles(key, index):
    """Noise from a key and an index, cheaper to compile than a generator."""
    return jnp.sin((jax.random.key_data(key)[-1] % 1000).astype(jnp.float32) + index)


@dataclass(frozen=True)
class Linear:
    """Noisy regression."""

    def init(self, key, batch):
        return {"w": angles(key, jnp.arange(6)).reshape(3, 2), "b": jnp.zeros(2)}

    def loss(self, params, frozen, batch, key, train=True):
        x = batch["x"] + 0.2 * angles(key, 3 * batch["index"][:, None] + jnp.arange(3))
        error = x @ params["w"] + params["b"] - batch["y"]
        if frozen is not None:
            error = error + frozen["offset"]
        return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


def batch_of(step, size=8):
    x = np.random.default_rng(step).normal(size=(size, 3)).astype(np.float32)
    return {"x": x, "y": 2 * x[:, :2], "index": np.arange(size, dtype=np.int32)}


def batches(start, poison=(), end=10**9):
    """The steps' batches; those of steps in ``poison`` give NaN."""
    for step in range(start, end):
        batch = batch_of(step)
        if step in poison:
            batch["x"] = np.full_like(batch["x"], np.nan)
        yield batch


EMAS = {"constant": ema.constant(0.9), "power": ema.power_function(0.1)}


def run(workdir, steps, **changes):
    settings = dict(
        objective=Linear(),
        optimizer=optimizers.make("adamw", 1e-2, warmup=3, clip_norm=1.0),
        emas=EMAS,
        batches=batches,
        steps=steps,
        workdir=workdir,
        log_every=3,
        checkpoint_every=5,
        devices=jax.devices()[:1],
    )
    return loop.fit(**(settings | changes))


def lines(workdir):
    """metrics.jsonl without what differs from run to run."""
    rows = [json.loads(line) for line in (Path(workdir) / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for name in OF_THE_MACHINE:
            row.pop(name, None)
    return rows


def assert_identical(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)
