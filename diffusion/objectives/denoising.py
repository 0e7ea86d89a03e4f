"""The denoising objective: predict the data, the noise or a mixture of both from a noised example.

    loss = E_{x_0, eps, t} [ w(t) d(F(c_in x_t, c_noise), F*) ],    x_t = alpha x_0 + sigma eps

Prediction (what F means), time distribution (which t), weighting (w) and distance (d) are four
independent functions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion import conditioning, predictions
from diffusion.conditioning import Conditioning
from diffusion.denoiser import ConditionalDenoise, denoiser
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.objectives import couplings, distances, quartiles, times, weightings
from diffusion.objectives.terms.alignment import Alignment
from diffusion.objectives.terms.variance import VariationalBound
from diffusion.predictions import Prediction
from diffusion.schedules import Schedule

Params = Any


class Uncertainty(nn.Module):
    """Log-variance u(level) of the loss at each noise level (EDM2, Karras et al., 2024, eq. 21).

    Fixed random Fourier features of log(sigma / alpha) / 4 and one linear layer, zero at first.
    """

    features: int = 128

    @nn.compact
    def __call__(self, level: NoiseLevel) -> Array:
        frequency, phase = jax.random.uniform(jax.random.key(0), (2, self.features))
        # Clipped, since the ratio is infinite where alpha = 0.
        position = jnp.clip(jnp.log(level.ratio) / 4, -5.0, 5.0)
        angles = 2 * jnp.pi * (position[:, None] * (4 * frequency - 2)[None] + phase[None])
        return nn.Dense(1, kernel_init=nn.initializers.zeros)(jnp.cos(angles))[:, 0]


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Trains ``network`` as a denoiser.

    Attributes:
      network: linen module ``(x, c_noise, cond, train) -> F``.
      schedule, prediction, c_noise: see those modules.
      times: time distribution.
      weighting: factor of the distance, a function of (level, c_out).
      distance: [B, ...] x [B, ...] -> [B].
      coupling: which noise an example is mixed with, in training alone.
      null: makes the null conditioning (for classifier-free guidance) from a conditioning.
      dropout: probability that an example is trained with the null conditioning.
      stratify: the global batch size, to spread times evenly over it; None draws independently.
      t_min: smallest time trained on.
      noise_offset: strength of a noise that is the same in all of a channel's pixels, added to the
        noise, so that the mean of an image is noised as quickly as its details (Guttenberg, 2023).
      input_perturbation: strength of a second noise, in x_t alone and not in the target (Ning et
        al., 2023).
      bound: given if the network also learns its variances (twice the channels); times must then
        be discrete with the bound's number of steps.
      alignment: given if inner tokens are aligned with an encoder's, in training alone.
      uncertainty: given if the loss L at each level is weighted by a learned exp(-u) with + u.
    """

    network: nn.Module
    schedule: Schedule
    prediction: Prediction
    c_noise: Callable[[NoiseLevel], Array]
    times: times.TimeDistribution = times.uniform
    weighting: weightings.Weighting = weightings.simple
    distance: distances.Distance = distances.l2
    coupling: couplings.Coupling = couplings.independent
    null: Callable[[Conditioning], Conditioning] = lambda cond: cond
    dropout: float = 0.0
    stratify: int | None = None
    t_min: float = 1e-5
    noise_offset: float = 0.0
    input_perturbation: float = 0.0
    bound: VariationalBound | None = None
    alignment: Alignment | None = None
    uncertainty: Uncertainty | None = None

    def init(self, key: Array, batch: Mapping[str, Array]) -> Params:
        """Initial parameters: {"network": ...} and, if there, "uncertainty" and "projector"."""
        x = jnp.asarray(batch["x"])
        level = self.schedule(jnp.full(len(x), 0.5 * self.schedule.t_max))
        cond = conditioning.from_batch(batch)
        key_network, key_uncertainty = jax.random.split(key)
        variables = self.network.init(key_network, x, self.c_noise(level), cond)
        params = {"network": variables["params"]}
        if self.uncertainty is not None:
            params["uncertainty"] = self.uncertainty.init(key_uncertainty, level)["params"]
        if self.alignment is not None:
            blocks = (self.alignment.block,)
            _, (tokens,) = jax.eval_shape(
                lambda v: self.network.apply(v, x, self.c_noise(level), cond, features=blocks),
                variables,
            )
            params["projector"] = self.alignment.init(jax.random.fold_in(key, 1), tokens)
        return params

    def loss(
        self,
        params: Params,
        frozen: Params,
        batch: Mapping[str, Array],
        key: Array,
        train: bool = True,
    ) -> tuple[Array, dict[str, Array]]:
        """The mean loss over a batch, and metrics: also the loss by quartile of the noise level.

        ``frozen`` is read for ``alignment`` alone.

        What is drawn for an example depends on ``key`` and on ``batch["index"]``, its place in the
        global batch (by default its place in this one), not on the device it lies on.
        """
        x0 = batch["x"]
        index = batch.get("index", jnp.arange(len(x0)))
        _, key_noise, key_drop, key_network = jax.random.split(key, 4)

        u = self._uniforms(key, index)
        level = self._levels(u)
        draw = partial(self._noise, key_noise, index, x0)
        noise = self.coupling(x0, draw, batch.get("label")) if train else draw(0)
        seen = noise
        if self.input_perturbation:
            more = normal(jax.random.fold_in(key_noise, 2**31 + 1), index, x0.shape[1:], x0.dtype)
            seen = noise + self.input_perturbation * more
        x_t = diffuse(x0, seen, level)

        cond = conditioning.from_batch(batch)
        if self.dropout > 0:
            dropped = times.independent_uniforms(key_drop, index) < self.dropout
            cond = conditioning.drop(cond, self.null(cond), dropped)

        c = predictions.precondition(self.prediction, level)
        aligned = train and self.alignment is not None
        output = self.network.apply(
            {"params": params["network"]},
            c.c_in.reshape((-1,) + (1,) * (x0.ndim - 1)) * x_t,
            self.c_noise(level),
            cond,
            train=train,
            rngs={"dropout": jax.random.fold_in(key_network, index[0])},
            **({"features": (self.alignment.block,)} if aligned else {}),
        )
        output, (tokens,) = output if aligned else (output, (None,))
        output = output.astype(x0.dtype)

        variance = None
        if self.bound is not None:
            output, variance = jnp.split(output, 2, axis=-1)
        target = predictions.target(self.prediction, level, x0, noise)
        distance = self.distance(output, target)
        loss = self.weighting(level, c.c_out) * distance
        measured = {"distance": distance.mean()}
        if self.bound is not None:
            x0_hat = predictions.to_x0(self.prediction, level, x_t, output)
            nu = (variance + 1) / 2
            vlb = self.bound(self.schedule, level.t, x0, x_t, x0_hat, nu)
            loss = loss + self.bound.weight * vlb
            measured["vlb"] = vlb.mean()
        if self.uncertainty is not None:
            u = self.uncertainty.apply({"params": params["uncertainty"]}, level)
            loss = loss * jnp.exp(-u) + u
        total = loss.mean()
        if aligned:
            added, similarity = self.alignment.loss(params["projector"], frozen, tokens, batch)
            total, measured["alignment"] = total + added, similarity
        return total, measured | quartiles.by_quartile(loss, u, self.times, self.schedule)

    def levels(self, key: Array, index: Array) -> NoiseLevel:
        """The noise levels [B] at which ``loss`` with this key sees examples ``index`` [B]."""
        return self._levels(self._uniforms(key, index))

    def denoiser(self, params: Params, frozen: Params | None = None) -> ConditionalDenoise:
        """E[x_0 | x_t] as the network with these parameters estimates it."""
        del frozen

        def network(x: Array, c_noise: Array, cond: Conditioning) -> Array:
            return self.network.apply({"params": params["network"]}, x, c_noise, cond)

        return denoiser(network, self.prediction, self.c_noise)

    def _noise(self, key: Array, index: Array, x0: Array, j: int) -> Array:
        """The j-th noise of each example."""
        key = key if j == 0 else jax.random.fold_in(key, 2**30 + j)
        noise = normal(key, index, x0.shape[1:], x0.dtype)
        if self.noise_offset:
            means = (*(1,) * (x0.ndim - 2), x0.shape[-1])  # one number per channel
            offset = normal(jax.random.fold_in(key, 2**31), index, means, x0.dtype)
            noise = noise + self.noise_offset * offset
        return noise

    def _uniforms(self, key: Array, index: Array) -> Array:
        key = jax.random.split(key, 4)[0]
        if self.stratify is None:
            return times.independent_uniforms(key, index)
        return times.stratified_uniforms(key, index, self.stratify)

    def _levels(self, u: Array) -> NoiseLevel:
        return self.schedule(
            jnp.clip(self.times(u, self.schedule), self.t_min, self.schedule.t_max)
        )


def normal(key: Array, index: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Standard normal numbers [B, *shape], example i's from ``key`` and index[i]."""
    # Drawn flat: XLA compiles that three times faster than drawing images under vmap.
    size = math.prod(shape)
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (size,), dtype))(
        index
    ).reshape(len(index), *shape)
