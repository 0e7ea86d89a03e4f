"""A tiny run for the tests: a linear model, whose data and noise depend on the step alone."""

import json
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion import ema
from diffusion.training import loop, optimizers

OF_THE_MACHINE = (
    "images_per_second",
    "step_seconds",
    "waiting_for_data",
    "teraflops_per_second",
    "share_of_peak",
    "device_memory_gib",
    "process_memory_gib",
)
"""Metrics that differ from run to run; all others are the same to the bit on a CPU."""


def angles(key, index):
    """Noise from a key and an index, cheaper to compile than a generator."""
    return jnp.sin((jax.random.key_data(key)[-1] % 1000).astype(jnp.float32) + index)


@dataclass(frozen=True)
class Linear:
    """Noisy regression."""

    def init(self, key, batch):
        return {"w": angles(key, jnp.arange(6)).reshape(3, 2), "b": jnp.zeros(2)}

    def loss(self, params, context, batch, key):
        x = batch["x"] + 0.2 * angles(key, 3 * batch["index"][:, None] + jnp.arange(3))
        error = x @ params["w"] + params["b"] - batch["y"]
        if context.frozen is not None:
            error = error + context.frozen["offset"]
        return jnp.mean(error**2), {"mae": jnp.mean(jnp.abs(error))}


@dataclass(frozen=True)
class Rivals(Linear):
    """Regression weighted by a second network, which learns how large the error is."""

    tx = optax.adam(0.05)

    def extra(self, key, batch):
        params = {"a": angles(key, jnp.arange(3))}
        return {"params": params, "opt_state": self.tx.init(params)}

    def step(self, tools, state, frozen, batch, key):
        context, old = tools.context(state, frozen), state.extra

        def losses(both, piece):
            loss, metrics = self.loss(both[0], context, piece, key)
            guess = jnp.mean(jnp.square(piece["x"] @ both[1]["a"]))
            weight = 1 + 0.1 * jax.lax.stop_gradient(guess)
            return weight * loss + (guess - jax.lax.stop_gradient(loss)) ** 2, metrics

        both = state.params, old["params"]
        grads, metrics = tools.gradients(losses, both, batch)
        updates, opt_state = self.tx.update(grads[1], old["opt_state"], old["params"])
        extra = {"params": optax.apply_updates(old["params"], updates), "opt_state": opt_state}
        new = tools.updated(state, grads[0]).replace(extra=extra)
        return tools.finish(state, new, grads, metrics)


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
