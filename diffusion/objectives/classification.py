"""The classification objective: tell the label of a noised example, at every noise level.

    loss = E_{x_0, y, eps, t} [ -log p(y | x_t, t) ],    x_t = alpha x_0 + sigma eps

What guides a denoiser by its gradient (Dhariwal & Nichol, 2021; Song et al., 2021).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion.conditioning import Conditioning
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.objectives import times
from diffusion.objectives.noise import normal
from diffusion.objectives.objective import Batch, Context, Measured, Params, network_alone
from diffusion.predictions import Prediction
from diffusion.schedules import Schedule

Classify = Callable[[Array, NoiseLevel], Array]  # (x_t [B, ...], level) -> logits [B, K]


@dataclasses.dataclass(frozen=True)
class Classification:
    """Trains ``network`` as a classifier of noised examples.

    Attributes:
      network: linen module ``(c_in x, c_noise, cond, train) -> logits [B, K]``.
      prediction: only its c_in is used, so that input is scaled as the denoiser's is.
      times, stratify, t_min: as in ``Denoising``.
    """

    network: nn.Module
    schedule: Schedule
    prediction: Prediction
    c_noise: Callable[[NoiseLevel], Array]
    times: times.TimeDistribution = times.uniform
    stratify: int | None = None
    t_min: float = 1e-5
    step: ClassVar[None] = None
    network_params = staticmethod(network_alone)

    def init(self, key: Array, batch: Batch) -> Params:
        """Initial parameters {"network": ...}."""
        x = jnp.asarray(batch["x"])
        level = self.schedule(jnp.full(len(x), 0.5 * self.schedule.t_max))
        variables = self.network.init(key, x, self.c_noise(level), Conditioning())
        return {"network": variables["params"]}

    def loss(self, params: Params, context: Context, batch: Batch, key: Array) -> Measured:
        """The mean cross-entropy over a batch with "x" and "label", and the accuracy."""
        x0, label = batch["x"], batch["label"]
        index = batch.get("index", jnp.arange(len(x0)))
        _, key_noise, key_network = jax.random.split(key, 3)
        level = self.levels(key, index)
        x_t = diffuse(x0, normal(key_noise, index, x0.shape[1:], x0.dtype), level)
        rngs = {"dropout": jax.random.fold_in(key_network, index[0])}
        logits = self._apply(params, x_t, level, train=context.train, rngs=rngs)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1)[:, 0]
        hit = logits.argmax(-1) == label
        return -chosen.mean(), {"accuracy": hit.mean(dtype=jnp.float32)}

    def levels(self, key: Array, index: Array) -> NoiseLevel:
        """The noise levels [B] at which ``loss`` with this key sees examples ``index`` [B]."""
        u = times.uniforms(jax.random.split(key, 3)[0], index, self.stratify)
        return times.levels(u, self.times, self.schedule, self.t_min)

    def classifier(self, params: Params) -> Classify:
        """(x_t [B, ...], level with leaves () or [B]) -> logits [B, K]."""
        return lambda x, level: self._apply(params, x, level)

    def features(self, params: Params, x: Array) -> Array:
        """[B, h, w, C] in the middle of an ``Encoder``, of x [B, H, W, C] at the smallest time."""
        level = self.schedule(jnp.full(len(x), self.t_min))

        def middle(network: nn.Module, x: Array, time: Array) -> Array:
            cond = Conditioning()
            return network.encode(x, network.embed(time, cond), cond, train=False)[1]

        c_in = self.prediction(level.expand(x.ndim)).c_in
        variables = {"params": params["network"]}
        return self.network.apply(variables, c_in * x, self.c_noise(level), method=middle)

    def _apply(self, params: Params, x: Array, level: NoiseLevel, **options: Any) -> Array:
        c_in = self.prediction(level.expand(x.ndim)).c_in
        noise = jnp.broadcast_to(self.c_noise(level), x.shape[:1])
        variables = {"params": params["network"]}
        return self.network.apply(variables, c_in * x, noise, Conditioning(), **options)
