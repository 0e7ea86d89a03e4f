"""Optimisers with warm-up, decay and clipping, built on optax.

One step is one update: what an optimiser counts, learning-rate schedules count, and the state
counts is the same number, because the train step accumulates gradients before an update.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from diffusion.errors import check_range

NAMES = ("adam", "adamw", "lion", "muon", "sgd")
DECAYS = ("constant", "cosine", "linear", "rsqrt")


class Optimizer(NamedTuple):
    """An optax transformation, and the learning rate it uses at each step (for the log)."""

    tx: optax.GradientTransformation
    learning_rate: optax.Schedule


def schedule(
    learning_rate: float,
    *,
    warmup: int = 0,
    decay: str = "constant",
    decay_start: int = 0,
    steps: int | None = None,
) -> optax.Schedule:
    """The learning rate at step s = 0, 1, ...

    It rises as (s + 1) / warmup, stays until ``hold = max(warmup, decay_start)`` and then is
    multiplied by, with p = (s - hold) / (steps - hold) in [0, 1],

        constant: 1    cosine: (1 + cos(pi p)) / 2    linear: 1 - p    rsqrt: sqrt(hold / s)

    ``rsqrt`` with decay_start = 70,000 is EDM2's (Karras et al., 2024).
    """
    if decay not in DECAYS:
        raise ValueError(f"unknown decay {decay!r}; choose one of {', '.join(DECAYS)}")
    hold = max(warmup, decay_start)
    if decay == "rsqrt" and hold < 1:
        raise ValueError("decay 'rsqrt' needs warmup or decay_start of at least 1 step")
    if decay in ("cosine", "linear") and (steps is None or steps <= hold):
        raise ValueError(f"decay {decay!r} needs steps > {hold}, the end of warm-up; got {steps}")

    def factor(step):
        if decay == "constant":
            return 1.0
        if decay == "rsqrt":
            return jnp.sqrt(hold / jnp.maximum(step, hold))
        p = jnp.clip((step - hold) / (steps - hold), 0, 1)
        return 1 - p if decay == "linear" else (1 + jnp.cos(jnp.pi * p)) / 2

    def rate(step):
        step = jnp.asarray(step, jnp.float32)
        return learning_rate * jnp.minimum(1, (step + 1) / max(warmup, 1)) * factor(step)

    return rate


def make(
    name: str,
    learning_rate: float,
    *,
    warmup: int = 0,
    decay: str = "constant",
    decay_start: int = 0,
    steps: int | None = None,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = None,
    rates: Sequence[tuple[str, float]] = (),
) -> Optimizer:
    """The optimiser by name, with its learning-rate schedule.

    Args:
      name: adam; adamw; lion; sgd (with momentum b1; 0 for none); muon (orthogonalises matrices,
        with momentum 0.95, and scales them to the size of Adam's updates, as Liu et al., 2025;
        the other parameters take Adam with b1, b2, eps; both with Nesterov's look ahead).
      learning_rate, warmup, decay, decay_start, steps: see ``schedule``.
      weight_decay: decoupled, on parameters of at least two axes (not on biases and scales); not
        for adam and sgd.
      rates: pairs (regular expression, factor): the updates of parameters in whose paths, such as
        "network/conv_in/kernel", the expression is found are multiplied by the factor, that of the
        first pair that fits. So have LoRA's B (Hayou et al., 2024) or a text encoder their own.
      clip_norm: gradients with a larger global norm are scaled down to it; None for no clipping.
    """
    if name not in NAMES:
        raise ValueError(f"unknown optimizer {name!r}; choose one of {', '.join(NAMES)}")
    if weight_decay and name in ("adam", "sgd"):
        raise ValueError(f"{name} takes no weight_decay (got {weight_decay}); use adamw")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"clip_norm must be positive or None, got {clip_norm}")
    rate = schedule(learning_rate, warmup=warmup, decay=decay, decay_start=decay_start, steps=steps)
    if name == "adam":
        tx = optax.adam(rate, b1, b2, eps)
    elif name == "adamw":
        tx = optax.adamw(rate, b1, b2, eps, weight_decay=weight_decay, mask=_matrices)
    elif name == "lion":
        tx = optax.lion(rate, b1, b2, weight_decay=weight_decay, mask=_matrices)
    elif name == "sgd":
        tx = optax.sgd(rate, momentum=b1 or None)
    else:
        tx = optax.contrib.muon(
            rate,
            eps=eps,
            weight_decay=weight_decay,
            weight_decay_mask=_matrices,
            adam_b1=b1,
            adam_b2=b2,
            adam_weight_decay=weight_decay,
            consistent_rms=0.2,
        )
    if rates:
        tx = optax.chain(tx, scaled_by_path(rates))
    if clip_norm is not None:
        tx = optax.chain(optax.clip_by_global_norm(clip_norm), tx)
    return Optimizer(tx, rate)


def scaled_by_path(rates: Sequence[tuple[str, float]]) -> optax.GradientTransformation:
    """Multiplies updates by the factor of the first pair whose expression is found in their path.

    Raises:
      ValueError: not pairs of a regular expression and a factor of at least 0; in ``init``, an
        expression that is found in no path.
    """
    for pair in rates:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise ValueError(f"rates={rates}: expected pairs, as in (('text/', 0.1),)")
        check_range(f"rates: the factor of {pair[0]!r}", pair[1], 0)
        try:
            re.compile(pair[0])
        except re.error as error:
            raise ValueError(f"rates: {pair[0]!r} is no regular expression: {error}") from None

    def names(tree: Any) -> list[str]:
        paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
        return [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]

    def init(params: Any) -> optax.EmptyState:
        known = names(params)
        for pattern, _ in rates:
            if not any(re.search(pattern, name) for name in known):
                raise ValueError(f"rates: no parameter's path has {pattern!r}; one is {known[0]}")
        return optax.EmptyState()

    def update(updates: Any, state: optax.EmptyState, params: Any = None) -> tuple[Any, Any]:
        known, (leaves, structure) = names(updates), jax.tree.flatten(updates)
        factors = [next((f for p, f in rates if re.search(p, name)), 1.0) for name in known]
        return jax.tree.unflatten(structure, [f * leaf for f, leaf in zip(factors, leaves)]), state

    return optax.GradientTransformation(init, update)


def _matrices(params: Any) -> Any:
    return jax.tree.map(lambda p: jnp.ndim(p) >= 2, params)
