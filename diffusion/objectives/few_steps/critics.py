"""What judges a student's samples: heads on inner features of another network.

    critic:  loss of (logits of real examples, logits of samples),    student:  loss of its logits

The network may be the teacher, the fake score, or one that sees clean pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.conditioning import Conditioning
from diffusion.denoiser import on_schedule
from diffusion.levels import Array, NoiseLevel
from diffusion.predictions import Prediction, precondition
from diffusion.schedules import Schedule

FEATURES = "features"
"""The parameters of a feature network in ``Context.frozen``, unless it is the teacher."""

Logits = tuple[Array, ...]  # [B, N] of each layer's N tokens


class Extract(Protocol):
    """(parameters, x [B, ...], level with leaves [B], cond) -> features [B, ..., C] of layers."""

    def __call__(
        self, params: Any, x: Array, level: NoiseLevel, cond: Conditioning
    ) -> tuple[Array, ...]: ...


class Features(NamedTuple):
    """Which network's features are judged.

    Attributes:
      kind: "teacher" or "middle" (its middle block), "classifier" or "dinov2".
      path: of its run or folder; of the teacher none.
      layers: of the network, counted from 1; none: the usual ones.
      size: side of the pictures that ``dinov2`` sees, in pixels.
    """

    kind: str
    path: str = ""
    layers: tuple[int, ...] = ()
    size: int = 224


def teacher(layers: tuple[int, ...] = ()) -> Features:
    """The teacher's own blocks, by default all of them."""
    return Features("teacher", "", layers)


def classifier(workdir: str, layers: tuple[int, ...] = ()) -> Features:
    """The blocks of a classifier of noised examples that was trained here, by default all."""
    return Features("classifier", workdir, layers)


def dinov2(model: str, layers: tuple[int, ...] = (), size: int = 224) -> Features:
    """Layers of DINOv2 from a folder or an id, by default four, evenly spaced."""
    return Features("dinov2", model, layers, size)


CHOICES = {f.__name__: f for f in (teacher, classifier, dinov2)}


@dataclasses.dataclass(frozen=True)
class Inner:
    """Blocks of a network that sees noised examples.

    Attributes:
      network: linen module with an argument ``features``.
      prediction: only its c_in is used.
      schedule: the network's; None: the one that levels are of.
      blocks: as the network counts them.
      blind: whether it takes no conditioning.
    """

    network: nn.Module
    prediction: Prediction
    c_noise: Callable[[NoiseLevel], Array]
    schedule: Schedule | None
    blocks: tuple[int, ...]
    blind: bool = False

    def __call__(
        self, params: Any, x: Array, level: NoiseLevel, cond: Conditioning
    ) -> tuple[Array, ...]:
        """See ``Extract``."""
        if self.schedule is not None:
            x, level = on_schedule(self.schedule, x, level)
        c_in = precondition(self.prediction, level.expand(x.ndim)).c_in
        time = jnp.broadcast_to(self.c_noise(level), x.shape[:1])
        cond = Conditioning() if self.blind else cond.replace(guidance=None, span=None)
        variables = {"params": params["network"]}
        return self.network.apply(variables, c_in * x, time, cond, features=self.blocks)[1]


class Heads(nn.Module):
    """Features of layers -> logits [B, N] of each layer's N tokens, float32; real is positive.

    Each layer has two dense layers of its own. Of ``given`` [B, C] each head learns a vector, whose
    product with the token's is added (projection, Miyato & Koyama, 2018).
    """

    width: int = 64

    @nn.compact
    def __call__(self, layers: Sequence[Array], given: Array | None = None) -> Logits:
        logits = []
        for i, tokens in enumerate(layers):
            x = tokens.reshape(len(tokens), -1, tokens.shape[-1]).astype(jnp.float32)
            x = nn.LayerNorm(use_scale=False, use_bias=False, name=f"norm_{i}")(x)
            x = nn.leaky_relu(nn.Dense(self.width, name=f"linear_in_{i}")(x), 0.2)
            x = nn.leaky_relu(nn.Dense(self.width, name=f"linear_{i}")(x), 0.2)
            out = nn.Dense(1, name=f"linear_out_{i}")(x)[..., 0]
            if given is not None:
                seen = nn.Dense(self.width, name=f"given_{i}")(given.astype(jnp.float32))
                out = out + (x * seen[:, None]).mean(-1)
            logits.append(out)
        return tuple(logits)


def init_heads(key: Array, heads: Heads, layers: Sequence[Any], given: Any = None) -> Any:
    """Initial parameters, of the shapes of features."""
    zeros = [jnp.zeros(layer.shape, layer.dtype) for layer in layers]
    given = None if given is None else jnp.zeros(given.shape, given.dtype)
    return heads.init(key, zeros, given)["params"]


class Game(NamedTuple):
    """Losses of the critic, of (real, fake) logits, and of the student, of its samples' logits."""

    critic: Callable[[Logits, Logits], Array]
    student: Callable[[Logits], Array]


def _mean(logits: Logits, function: Callable[[Array], Array] = lambda x: x) -> Array:
    return sum(function(x).mean() for x in logits) / len(logits)


GAMES = {
    "hinge": Game(
        lambda real, fake: (
            _mean(real, lambda x: nn.relu(1 - x)) + _mean(fake, lambda x: nn.relu(1 + x))
        ),
        lambda fake: -_mean(fake),
    ),
    "softplus": Game(
        lambda real, fake: (
            _mean(real, lambda x: nn.softplus(-x)) + _mean(fake, lambda x: nn.softplus(x))
        ),
        lambda fake: _mean(fake, lambda x: nn.softplus(-x)),
    ),
    "squares": Game(
        lambda real, fake: (_mean(real, lambda x: (x - 1) ** 2) + _mean(fake, lambda x: x**2)) / 2,
        lambda fake: _mean(fake, lambda x: (x - 1) ** 2) / 2,
    ),
}
"""Hinge, the logistic loss (Goodfellow et al., 2014) and least squares (Mao et al., 2017)."""


def slope_penalty(judge: Callable[[Sequence[Array]], Logits], layers: Sequence[Array]) -> Array:
    """R1 (Mescheder et al., 2018) on features: the mean of |d logits / d features|^2 over examples.

    The square is summed over layers and tokens, whose logits depend on themselves alone.
    """
    slopes = jax.grad(lambda layers: sum(x.sum() for x in judge(layers)))(tuple(layers))
    return sum(jnp.sum(slope.astype(jnp.float32) ** 2) for slope in slopes) / len(layers[0])
