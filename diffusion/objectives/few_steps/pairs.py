"""Pairs of noise levels whose estimates a student learns to agree on.

A choice of pairs is ``(u, setting) -> Pair``, with u [B] uniform in (0, 1): which level the student
sees (``now``), where the same trajectory is seen again (``to``), at which level the two are
compared (``end``, by default at the clean data), and how much the pair counts.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr, ndtri

from diffusion.errors import check_range
from diffusion.levels import Array, NoiseLevel
from diffusion.objectives.times import TimeDistribution
from diffusion.schedules import Schedule

LARGEST = 1e4
"""A sigma / alpha beyond which nothing is left of the data."""


class Setting(NamedTuple):
    """What pairs are chosen for: a schedule, the objective's times, and the step of training ()."""

    schedule: Schedule
    times: TimeDistribution
    step: Array | int = 0

    def at(self, ratio: Array) -> NoiseLevel:
        """The levels with this sigma / alpha, at most the schedule's last."""
        ratio = jnp.asarray(ratio)
        t = self.schedule.invert(jnp.ones_like(ratio), ratio)
        return self.schedule(jnp.minimum(t, self.schedule.t_max))

    def at_fraction(self, share: Array) -> NoiseLevel:
        """The levels with this sigma / (alpha + sigma) in [0, 1], at most the schedule's last."""
        t = self.schedule.invert(1 - share, share)
        return self.schedule(jnp.minimum(t, self.schedule.t_max))

    @property
    def clean(self) -> NoiseLevel:
        """No noise; leaves ()."""
        return self.schedule(jnp.zeros(()))


class Pair(NamedTuple):
    """Levels with leaves [B], from more noise to less, and the weight [B] of the pair."""

    now: NoiseLevel
    to: NoiseLevel
    end: NoiseLevel
    weight: Array


@runtime_checkable
class Pairs(Protocol):
    """A choice of pairs; its monotone map from u to ``now`` makes stratified u cover all levels.

    Attributes:
      anywhere: whether pairs end at other levels than the clean data, to which a network can only
        aim if it is told where (a two-time network), except for the ends of ``segments``.
    """

    anywhere: bool

    def __call__(self, u: Array, setting: Setting) -> Pair: ...


def _pair(now: NoiseLevel, to: NoiseLevel, setting: Setting, end=None, weight=None) -> Pair:
    if end is None:
        end = NoiseLevel(*(jnp.broadcast_to(leaf, now.t.shape) for leaf in setting.clean))
    return Pair(now, to, end, jnp.ones(now.t.shape) if weight is None else weight)


def _nodes(count: int, setting: Setting) -> Array:
    """[count + 1] times: node n at the quantile n / count, the first at 0, the last at t_max."""
    inner = jnp.sort(setting.times(jnp.arange(1, count) / count, setting.schedule))
    end = jnp.full(1, float(setting.schedule.t_max))
    return jnp.concatenate([jnp.zeros(1), inner, end])


@dataclasses.dataclass(frozen=True)
class Nodes:
    """Neighbours of N + 1 = count + 1 nodes 0 = t_0 < ... < t_N = t_max (Song et al., 2023).

    Node n lies at the quantile n / N of config.objective.times. On a table of 1000 steps with
    uniform times, count=50 are latent consistency models' indices 20 n - 1 (Luo et al., 2023).
    """

    count: int = 18
    anywhere = False

    def __post_init__(self) -> None:
        check_range("count", self.count, 1, 100_000)

    def __call__(self, u: Array, setting: Setting) -> Pair:
        t = _nodes(self.count, setting)
        n = jnp.floor(u * self.count).astype(jnp.int32)
        return _pair(setting.schedule(t[n + 1]), setting.schedule(t[n]), setting)


@dataclasses.dataclass(frozen=True)
class Segments:
    """Neighbours of ``nodes``, compared at the start of their segment of ``count``.

    The student jumps to segments' ends (Wang et al., 2024; Ren et al., 2024, Hyper-SD: 8, 4, 2, 1
    segments one after another). The ends are nodes, so that ``count`` divides ``nodes``.
    """

    count: int = 4
    nodes: int = 32
    anywhere = False

    def __post_init__(self) -> None:
        check_range("count", self.count, 1, 100_000)
        check_range("nodes", self.nodes, self.count, 100_000)
        if self.nodes % self.count:
            low = self.nodes - self.nodes % self.count
            raise ValueError(
                f"nodes={self.nodes} must be a multiple of count={self.count}; nearest: {low} or "
                f"{low + self.count}"
            )

    def __call__(self, u: Array, setting: Setting) -> Pair:
        t, length = _nodes(self.nodes, setting), self.nodes // self.count
        n = jnp.floor(u * self.nodes).astype(jnp.int32)
        now, to, end = (setting.schedule(t[i]) for i in (n + 1, n, n // length * length))
        return _pair(now, to, setting, end)


@dataclasses.dataclass(frozen=True)
class Trajectories:
    """Neighbours of count + 1 nodes, compared at any node below (Kim et al., 2024, CTM).

    Each end is equally likely. They need a network that is told where it aims.
    """

    count: int = 18
    anywhere = True

    def __post_init__(self) -> None:
        check_range("count", self.count, 1, 4096)  # u has the digits for the two numbers

    def __call__(self, u: Array, setting: Setting) -> Pair:
        t, place = _nodes(self.count, setting), u * self.count
        n = jnp.floor(place).astype(jnp.int32)
        # Within its stratum the place is again uniform, and independent of n.
        end = jnp.floor((place - n) * (n + 1)).astype(jnp.int32)
        now, to, end = (setting.schedule(t[i]) for i in (n + 1, n, end))
        return _pair(now, to, setting, end)


@dataclasses.dataclass(frozen=True)
class Karras:
    """Neighbours of 0 and ``count`` nodes sigma_n^(1/rho), evenly spaced (Karras et al., 2022).

    sigma stands for sigma / alpha, from ``sigma_min`` to ``sigma_max``. ``first`` below ``count``
    makes a curriculum (Song & Dhariwal, 2023): the number of nodes begins there and doubles, at
    equal intervals of ``steps`` steps, up to ``count``. With ``std`` > 0 a pair's probability is
    the mass of log sigma ~ N(mean, std^2) between its nodes, and it counts as 1 / (sigma_{n+1} -
    sigma_n); else all are as likely and count alike.
    """

    count: int = 18
    first: int = 0
    steps: int = 0
    rho: float = 7.0
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    mean: float = -1.1
    std: float = 0.0
    anywhere = False

    def __post_init__(self) -> None:
        check_range("count", self.count, 2, 100_000)
        check_range("rho", self.rho, 0, above=True)
        check_range("sigma_min", self.sigma_min, 0, above=True)
        check_range("sigma_max", self.sigma_max, self.sigma_min, LARGEST, above=True)
        check_range("std", self.std, 0, 30)
        check_range("first", self.first, 0, self.count)
        if (self.first > 0) != (self.steps > 0):
            raise ValueError(
                f"first={self.first} nodes that double within steps={self.steps} steps: expected "
                "both, or neither"
            )

    def number(self, step: Array | int) -> Array:
        """How many nodes there are at a step of training; ()."""
        if not self.first:
            return jnp.asarray(self.count)
        stages = math.floor(math.log2(self.count / self.first)) + 1
        stage = jnp.minimum(jnp.asarray(step) // max(self.steps // stages, 1), stages)
        return jnp.minimum(self.first * 2**stage, self.count)

    def __call__(self, u: Array, setting: Setting) -> Pair:
        count = self.number(setting.step)
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

        def sigma(n: Array) -> Array:  # of node n = 1..count; node 0 is clean
            return (low + (high - low) * (n - 1) / (count - 1)) ** self.rho

        if self.std:
            ends = (math.log(s) - self.mean for s in (self.sigma_min, self.sigma_max))
            first, last = (ndtr(end / self.std) for end in ends)
            drawn = jnp.exp(self.mean + self.std * ndtri(first + u * (last - first)))
            place = (drawn ** (1 / self.rho) - low) / (high - low) * (count - 1)
            n = jnp.clip(jnp.floor(place), 0, count - 2) + 1
        else:
            n = jnp.floor(u * count)
        now, to = sigma(n + 1), jnp.where(n == 0, 0.0, sigma(jnp.maximum(n, 1)))
        weight = 1 / (now - to) if self.std else None
        return _pair(setting.at(now), setting.at(to), setting, weight=weight)


@dataclasses.dataclass(frozen=True)
class Ect:
    """Easy consistency tuning (Geng et al., 2024): the second level comes nearer in training.

    With t = sigma / alpha of config.objective.times, r = t max(0, 1 - (1 + k sigmoid(-b t)) / q^s),
    where s = 1, 2, ... is one more after every ``every`` steps. At r = 0 the target is the data
    themselves. A pair counts as 1 / (t - r), as a distance that is not squared does:
    objective.distance="pseudo_huber(c=1e-4)".
    """

    every: int = 1000
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    anywhere = False

    def __post_init__(self) -> None:
        check_range("every", self.every, 1)
        check_range("q", self.q, 1, above=True)
        check_range("k", self.k, 0)
        check_range("b", self.b, 0)

    def __call__(self, u: Array, setting: Setting) -> Pair:
        now = setting.schedule(setting.times(u, setting.schedule))
        t = jnp.minimum(now.sigma / jnp.maximum(now.alpha, now.sigma / LARGEST), LARGEST)
        stage = jnp.asarray(setting.step) // self.every + 1
        share = (1 + self.k * jax.nn.sigmoid(-self.b * t)) / self.q ** jnp.minimum(stage, 100)
        r = t * jnp.maximum(0, 1 - share)
        return _pair(now, setting.at(r), setting, weight=1 / (t - r))


CHOICES = {
    "nodes": Nodes,
    "segments": Segments,
    "trajectories": Trajectories,
    "karras": Karras,
    "ect": Ect,
}
