"""The denoising objective: predict the data, the noise or a mixture of both from a noised example.

    loss = E_{x_0, eps, t} [ w(t) d(F(c_in x_t, c_noise), F*) ],    x_t = alpha x_0 + sigma eps

Prediction (what F means), time distribution (which t), weighting (w) and distance (d) are four
independent functions. Terms change the loss of each example after that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion import conditioning, predictions
from diffusion.conditioning import Conditioning
from diffusion.denoiser import ConditionalDenoise, denoiser
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.objectives import couplings, distances, times, weightings
from diffusion.objectives.dropout import Dropout
from diffusion.objectives.noise import PLAIN, Gaussian
from diffusion.objectives.objective import Batch, Context, Measured, Params, network_alone
from diffusion.objectives.terms.term import Noised, Term
from diffusion.predictions import Prediction
from diffusion.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class Denoising:
    """Trains ``network`` as a denoiser.

    Attributes:
      network: linen module ``(x, c_noise, cond, train) -> F``.
      coupling: which noise an example is mixed with, in training alone.
      null: makes the null conditioning (for classifier-free guidance) from a conditioning.
      dropout: which signals of which examples are null in training; None drops nothing.
      stratify: the global batch size, to spread times evenly over it; None draws independently.
      t_min: smallest time trained on.
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
    dropout: Dropout | None = None
    stratify: int | None = None
    t_min: float = 1e-5
    noise: Gaussian = PLAIN
    terms: tuple[Term, ...] = ()
    step: ClassVar[None] = None
    network_params = staticmethod(network_alone)

    def init(self, key: Array, batch: Batch) -> Params:
        """Initial parameters: {"network": ...} and those of the terms, by name."""
        x, cond = jnp.asarray(batch["x"]), conditioning.from_batch(batch)
        level = self.schedule(jnp.full(len(x), 0.5 * self.schedule.t_max))
        variables = self.network.init(jax.random.split(key)[0], x, self.c_noise(level), cond)
        params = {"network": variables["params"]}
        if self.terms:
            args = batch, x, level, cond, True, {"dropout": key}
            noised = jax.eval_shape(lambda params: self._noised(params, *args)[0], params)
        for i, term in enumerate(self.terms):
            own = term.init(jax.random.fold_in(key, i + 1), noised)
            params |= {} if own is None else {term.name: own}
        return params

    def loss(self, params: Params, context: Context, batch: Batch, key: Array) -> Measured:
        """The mean loss over a batch, and metrics: also the loss by quartile of the noise level."""
        x0 = batch["x"]
        index = batch.get("index", jnp.arange(len(x0)))
        key_times, key_noise, key_drop, key_network = jax.random.split(key, 4)

        u = times.uniforms(key_times, index, self.stratify)
        level = times.levels(u, self.times, self.schedule, self.t_min)
        draw = partial(self.noise.draw, key_noise, index, x0)
        noise = self.coupling(x0, draw, batch.get("label")) if context.train else draw(0)
        x_t = diffuse(x0, self.noise.perturb(key_noise, index, noise), level)
        cond = self.conditioning(batch, index, key_drop)

        rngs = {"dropout": jax.random.fold_in(key_network, index[0])}
        noised, output = self._noised(params, batch, x_t, level, cond, context.train, rngs)
        distance = self.distance(output, predictions.target(self.prediction, level, x0, noise))
        loss = weightings.weights(self.weighting, self.prediction, level) * distance
        metrics, noised = {"distance": distance.mean()}, noised._replace(distance=distance)
        for term in self.terms:
            loss, measured = term(loss, params.get(term.name), context, noised)
            metrics |= measured
        return loss.mean(), metrics | times.by_quartile(loss, u, self.times, self.schedule)

    def levels(self, key: Array, index: Array) -> NoiseLevel:
        """The noise levels [B] at which ``loss`` with this key sees examples ``index`` [B]."""
        u = times.uniforms(jax.random.split(key, 4)[0], index, self.stratify)
        return times.levels(u, self.times, self.schedule, self.t_min)

    def conditioning(self, batch: Batch, index: Array, key: Array) -> Conditioning:
        """The batch's, with what ``dropout`` leaves of it."""
        cond = conditioning.from_batch(batch)
        if self.dropout is None:
            return cond
        return self.dropout(cond, self.null(cond), times.independent_uniforms(key, index))

    def denoiser(self, params: Params, **options: Any) -> ConditionalDenoise:
        """E[x_0 | x_t] as the network estimates it, called with these parameters and options."""
        network = partial(self.network.apply, {"params": params["network"]}, **options)
        return denoiser(network, self.prediction, self.c_noise)

    def _noised(self, params, batch, x_t, level, cond, train, rngs) -> tuple[Noised, Array]:
        """What the terms see, and the network's output, without learned variances."""
        blocks = tuple({b: None for term in self.terms for b in term.blocks}) if train else ()
        c_in = predictions.precondition(self.prediction, level.expand(x_t.ndim)).c_in
        variables = {"params": params["network"]}
        options = {"train": train, "rngs": rngs} | ({"features": blocks} if blocks else {})
        output = self.network.apply(variables, c_in * x_t, self.c_noise(level), cond, **options)
        output, tokens = output if blocks else (output, ())
        output, variance = output.astype(x_t.dtype), None
        if output.shape[-1] == 2 * x_t.shape[-1]:
            output, variance = jnp.split(output, 2, axis=-1)
        x0_hat = predictions.to_x0(self.prediction, level, x_t, output)
        return Noised(batch, x_t, level, x0_hat, variance, dict(zip(blocks, tokens))), output
