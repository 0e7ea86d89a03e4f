"""Evaluations that reuse an earlier one's features, whole output or guidance: cheaper sampling.

``cached`` transforms a denoiser, guidance included: at most evaluations its networks' deep parts
are not evaluated, but what they gave at the last refresh is put in place (``models.reuse``). When
to refresh is either a schedule, an array [R] that is data to the compiled sampler,

    denoise = cached(guidance.classifier_free(...), every(3)(evaluations), keep=1)

or a threshold, by which it is decided as it goes. ``sample`` runs one of two branches at each
evaluation: in a scan, ``lax.cond`` evaluates only the one. Under ``vmap`` it becomes a select, both
are evaluated, and nothing is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.denoiser import Denoise, Estimate, Stateful
from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel
from diffusion.models import reuse
from diffusion.sampling.guidance.transform import remembering

When = Array | np.ndarray | np.float32  # refreshes [R] bool, or a threshold () float
Schedule = Callable[[int], When]  # number of evaluations R -> when to refresh


class Memory(NamedTuple):
    """What a cached denoiser remembers."""

    count: Array  # () evaluations so far
    refreshed: Array  # () of them, those that evaluated everything
    features: reuse.Features  # of the last refresh
    seen: reuse.Features  # what a threshold compares, at the last refresh; empty without one
    inner: Any  # the memory of the denoiser that is cached


def every(n: int) -> Schedule:
    """Refreshes [R] at each n-th evaluation, beginning with the first (DeepCache's 1:N)."""
    _check_n(n)
    return lambda evaluations: np.arange(evaluations) % n == 0


def dense(n: int, center: float = 0.5, power: float = 1.4) -> Schedule:
    """As many refreshes [R] as ``every(n)``, closer to each other around ``center``.

    Refreshes lie at center + u |u|^(power - 1) for evenly spaced u (DeepCache's non-uniform 1:N,
    Ma et al., 2023, section 3.3), rounded; where two would fall together, the next free one.

    Args:
      n: evaluations per refresh, on average.
      center: share of the evaluations, in [0, 1]; 0 is the noisy end.
      power: >= 1; 1 is ``every``, up to rounding.
    """
    _check_n(n)
    check_range("center", center, 0, 1)
    check_range("power", power, 1, 100)

    def refreshes(evaluations: int) -> np.ndarray:
        count = -(-evaluations // n)
        low, high = -(center ** (1 / power)), (1 - center) ** (1 / power)
        u = np.linspace(low, high, count + 1)[:-1]
        ideal = evaluations * (center + np.sign(u) * np.abs(u) ** power)
        refresh = np.zeros(evaluations, bool)
        for place in np.round(ideal).astype(int).clip(0, evaluations - 1):
            free = np.flatnonzero(~refresh)
            refresh[free[np.argmin(np.abs(free - place) + 0.1 * (free < place))]] = True
        return refresh

    return refreshes


def at(rows: Sequence[int]) -> Schedule:
    """Refreshes [R] at the evaluations of these numbers, from 0; the first one is always."""
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ValueError(f"expected the numbers of evaluations, as in at((0, 2, 5)), got {rows!r}")

    def refreshes(evaluations: int) -> np.ndarray:
        for r in rows:
            if not isinstance(r, int) or not 0 <= r < evaluations:
                raise ValueError(f"there is no evaluation {r!r}; expected 0 to {evaluations - 1}")
        refresh = np.zeros(evaluations, bool)
        refresh[[0, *rows]] = True
        return refresh

    return refreshes


def adaptive(threshold: float) -> Schedule:
    """Refreshes where what the kept part sees has changed by the threshold, >= 0 (0: always).

    |I - I_ref|_1 > threshold |I_ref|_1: I is what the first blocks add to the tokens (first-block
    cache), a U-Net's last kept skip connection or, with keep = 0, the network's input
    (``reuse.inputs``), I_ref the same at the last refresh.
    """
    if not threshold >= 0:
        raise ValueError(f"threshold must be >= 0, got {threshold}")
    return lambda evaluations: np.float32(threshold)


def _check_n(n: int) -> None:
    if not isinstance(n, int) or isinstance(n, bool) or n < 1:
        raise ValueError(f"n must be a whole number >= 1, got {n!r}")


def cached(denoise: Denoise | Stateful, when: When, keep: int = 1) -> Stateful:
    """``denoise`` with its networks' deep parts evaluated only at refreshes.

    All network calls of one evaluation (guidance's batch of two, a weaker network's) are refreshed
    together. By a schedule, each image remains a function of its own noise alone. With a threshold
    the norms are over the batch of a device, since one branch is run for all of it: there an image
    depends on those that it is drawn with.

    Args:
      denoise: calls networks in itself; not jitted by itself. Gradients of other networks
        (``classifier_guidance``) belong outside, as do thresholds.
      when: [R] bool, by number of the evaluation; or () float, the threshold of ``adaptive``.
        The first evaluation is always a refresh; after R the last entry goes on to count.
      keep: how much of each network is evaluated every time; see ``models.reuse``.
    """
    init_inner, step, _ = remembering(denoise)
    compares = jnp.ndim(when) == 0

    def init(x: Array) -> Memory:
        level = NoiseLevel(*[jnp.ones((), jnp.result_type(float))] * 3)
        memory = init_inner(x)
        _, features = jax.eval_shape(reuse.record(step, keep), x, level, memory)
        seen = ()
        if compares:
            seen = jax.eval_shape(lambda f: reuse.inputs(step, keep, f)(x, level, memory), features)
        empty = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (features, seen))
        return Memory(jnp.int32(0), jnp.int32(0), *empty, memory)

    def evaluate(x: Array, level: NoiseLevel, memory: Memory) -> tuple[Estimate, Memory]:
        if compares:
            seen = reuse.inputs(step, keep, memory.features)(x, level, memory.inner)
            change = _size(jax.tree.map(jnp.subtract, seen, memory.seen))
            needed = (change > when * _size(memory.seen)) | (jnp.asarray(when) <= 0)
        else:
            seen, needed = (), jnp.asarray(when)[memory.count]
        needed |= memory.refreshed == 0

        def full(memory: Memory) -> tuple[Estimate, Memory]:
            (estimate, after), features = reuse.record(step, keep)(x, level, memory.inner)
            count = memory.refreshed + 1
            return estimate, Memory(memory.count + 1, count, features, seen, after)

        def cheap(memory: Memory) -> tuple[Estimate, Memory]:
            changed = reuse.reuse(step, keep, memory.features)
            estimate, after = changed(x, level, memory.inner)
            return estimate, memory._replace(count=memory.count + 1, inner=after)

        return jax.lax.cond(needed, full, cheap, memory)

    return Stateful(init, evaluate, lambda memory: memory._replace(count=memory.count + 1))


def _size(tree: reuse.Features) -> Array:
    return sum(jnp.abs(a).astype(jnp.float32).sum() for a in jax.tree.leaves(tree))


CHOICES = {f.__name__: f for f in (every, dense, at, adaptive)}
