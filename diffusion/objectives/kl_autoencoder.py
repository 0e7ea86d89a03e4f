"""The objective of KL autoencoders (Esser et al., 2021; Rombach et al., 2022).

Per number of the image, with z ~ N(mu(x), s(x)^2), y = decode(z), and D a discriminator's logits,

    nll  = r / exp(l) + l,    r = distance(x, y) + perceptual_weight * LPIPS(x, y)
    loss = nll + kl_weight * KL(z || N(0, 1)) / d + w * adversarial_weight * (-E D(y))
    w    = |d nll / d W| / (|d (-E D(y)) / d W| + 1e-4),    W: the decoder's last kernel

to which from ``adversarial_start`` on the discriminator's own loss is added: of x and y held fixed,
while -E D(y) holds D fixed, so that one gradient serves both networks, each with its own optimiser.
d is the numbers per image: this is the papers' loss divided by d, so that with their ``kl_weight``
their balance results, whatever the size of images.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from diffusion.levels import Array
from diffusion.models import discriminator
from diffusion.models.autoencoder import AutoencoderKL, Gaussian
from diffusion.objectives import distances
from diffusion.objectives.noise import normal
from diffusion.objectives.objective import Batch, Context, Measured, Params, Tools, network_alone


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A network that tells reconstructions from images, and how it is trained.

    Attributes:
      loss: of real and fake logits, the network's own.
      weight: of the adversarial loss, besides the adaptive weight.
      start: number of steps after which both losses count and the network is trained.
    """

    network: nn.Module
    tx: optax.GradientTransformation
    loss: Callable[[Array, Array], Array] = discriminator.hinge
    weight: float = 0.5
    start: int = 0


@dataclasses.dataclass(frozen=True)
class Autoencoding:
    """Trains ``network``, and the adversary's, whose state lies in ``TrainState.extra``.

    Attributes:
      perceptual: module (x, y) -> [B] whose parameters are ``frozen["perceptual"]``; or None.
      learned_variance: learn l, which is 0 otherwise.
    """

    network: AutoencoderKL
    distance: distances.Distance = distances.l1
    kl_weight: float = 1e-6
    perceptual: nn.Module | None = None
    perceptual_weight: float = 1.0
    adversary: Adversary | None = None
    learned_variance: bool = False
    network_params = staticmethod(network_alone)

    def init(self, key: Array, batch: Batch) -> Params:
        """Initial parameters {"network": ...} and maybe "log_variance"."""
        x = jnp.asarray(batch["x"])
        params = {"network": self.network.init(jax.random.split(key)[0], x)["params"]}
        if self.learned_variance:
            params["log_variance"] = jnp.zeros(())
        return params

    def extra(self, key: Array, batch: Batch) -> Any:
        """The adversary's initial "params" and "opt_state"; None without an adversary."""
        if self.adversary is None:
            return None
        x = jnp.asarray(batch["x"])
        params = self.adversary.network.init(jax.random.split(key)[1], x)["params"]
        return {"params": params, "opt_state": self.adversary.tx.init(params)}

    def loss(self, params: Params, context: Context, batch: Batch, key: Array) -> Measured:
        """nll + kl_weight * KL / d of a batch, without the adversary, and metrics."""
        return self.losses((params, None), context, batch, key)

    @property
    def step(self) -> Callable | None:
        """With an adversary, a step of both networks at once."""
        return None if self.adversary is None else self._both

    def _both(
        self, tools: Tools, state: Any, frozen: Any, batch: Batch, key: Array
    ) -> tuple[Any, dict[str, Any]]:
        """One gradient of both losses, of both networks' parameters, serves two optimisers."""
        context, old = tools.context(state, frozen), state.extra
        both = state.params, old["params"]
        grads, metrics = tools.gradients(
            lambda both, piece: self.losses(both, context, piece, key), both, batch
        )
        updates, opt_state = self.adversary.tx.update(grads[1], old["opt_state"], old["params"])
        extra = {"params": optax.apply_updates(old["params"], updates), "opt_state": opt_state}
        started = state.step >= self.adversary.start  # before that not even weights decay
        extra = jax.tree.map(lambda new, old: jnp.where(started, new, old), extra, old)
        new = tools.updated(state, grads[0]).replace(extra=extra)
        return tools.finish(state, new, grads, metrics)

    def losses(
        self, both: tuple[Params, Params | None], context: Context, batch: Batch, key: Array
    ) -> Measured:
        """The loss of (params, the adversary's or None), the adversary's own included."""
        (params, adversary), x, train = both, batch["x"], context.train
        index = batch.get("index", jnp.arange(len(x)))
        key_sample, key_network = jax.random.split(key)
        keys = jax.random.split(jax.random.fold_in(key_network, index[0]))
        latents = self._apply(params, "encode", x, train, keys[0])
        z = latents.at(normal(key_sample, index, latents.mean.shape[1:], latents.mean.dtype))

        # As a function of the last kernel too, whose gradients the adaptive weight compares.
        y, pull = jax.vjp(
            lambda kernel: self._apply(_with_kernel(params, kernel), "decode", z, train, keys[1]),
            params["network"]["decoder"]["conv_out"]["kernel"],
        )
        (nll, metrics), d_nll = jax.value_and_grad(self._nll, 1, has_aux=True)(
            params, y, x, context.frozen
        )
        kl = latents.kl().mean()
        loss = nll + self.kl_weight * kl / x[0].size
        metrics |= {"kl": kl / x[0].size}
        if adversary is not None:
            started = context.step >= self.adversary.start
            function, args = partial(self._adversarial, pull), (adversary, y, x, d_nll)
            shapes = jax.eval_shape(function, *args)
            nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
            added, measured = jax.lax.cond(started, function, lambda *_: nothing, *args)
            loss, metrics = loss + added, metrics | measured
        return loss, metrics

    def encode(self, params: Params, x: Array) -> Gaussian:
        """The latents' distribution, without dropout."""
        return self._apply(params, "encode", x)

    def reconstruct(self, params: Params, x: Array) -> Array:
        """Reconstructions [B, H, W, C] from the latents' mode, without dropout."""
        return self._apply(params, "decode", self.encode(params, x).mode())

    def _nll(self, params: Params, y: Array, x: Array, frozen: Params) -> Measured:
        error = self.distance(y, x).mean()
        metrics = {"reconstruction": error}
        if self.perceptual is not None:
            apart = self.perceptual.apply({"params": frozen["perceptual"]}, x, y).mean()
            metrics["perceptual"] = apart
            error = error + self.perceptual_weight * apart
        if not self.learned_variance:
            return error, metrics
        log_variance = metrics["log_variance"] = params["log_variance"]
        return error * jnp.exp(-log_variance) + log_variance, metrics

    def _adversarial(
        self, pull: Callable, adversary: Params, y: Array, x: Array, d_nll: Array
    ) -> Measured:
        """Both networks' losses, added; the adaptive weight among the metrics."""
        logits, trained = self.adversary.network.apply, {"params": adversary}
        fixed = jax.lax.stop_gradient(trained)
        unreal, d_unreal = jax.value_and_grad(lambda y: -logits(fixed, y).mean())(y)
        norms = [optax.tree.norm(pull(d.astype(y.dtype))) for d in (d_nll, d_unreal)]
        weight = jax.lax.stop_gradient(jnp.clip(norms[0] / (norms[1] + 1e-4), 0, 1e4))
        real, fake = logits(trained, x), logits(trained, jax.lax.stop_gradient(y))
        own = self.adversary.loss(real, fake)
        metrics = {"adversary": own, "adaptive_weight": weight}
        metrics |= {"logits_real": real.mean(), "logits_fake": fake.mean()}
        return self.adversary.weight * weight * unreal + own, metrics

    def _apply(
        self, params: Params, method: str, x: Array, train: bool = False, key: Array | None = None
    ) -> Any:
        rngs = {} if key is None else {"dropout": key}
        variables = {"params": params["network"]}
        return self.network.apply(variables, x, train, method=method, rngs=rngs)


def _with_kernel(params: Params, kernel: Array) -> Params:
    """The parameters with another kernel in the decoder's last layer."""
    decoder = params["network"]["decoder"]
    decoder = {**decoder, "conv_out": {**decoder["conv_out"], "kernel": kernel}}
    return params | {"network": {**params["network"], "decoder": decoder}}
