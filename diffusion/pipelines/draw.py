"""Drawing latents with a pretrained network: what guides them, what of a picture is kept.

Every pipeline is this with other arguments. What is compiled depends on the network, on what its
output means and on shapes only: prompts, scales, masks and schedulers with as many evaluations
share it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning
from diffusion.denoiser import (
    ConditionalDenoise,
    Denoise,
    Estimate,
    Stateful,
    denoiser,
)
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.pretrained.schedulers import Sampler
from diffusion.sampling.acceleration import NONE, Acceleration
from diffusion.sampling.editing import noised
from diffusion.sampling.guidance import chain
from diffusion.sampling.guidance.chain import Branches, Chain
from diffusion.sampling.guidance.transform import Step, lift
from diffusion.sampling.sample import Callback, Draw, image_noise, make_sampler


@flax.struct.dataclass
class Kept:
    """The part of a picture that stays (``keep``).

    Attributes:
      x0: [B, h, w, C] the picture's latents.
      mask: [B, h, w, 1], 1 where it stays.
      noise: [B, h, w, C] what it is noised with.
    """

    x0: Array
    mask: Array
    noise: Array


@flax.struct.dataclass
class Steering:
    """What the samples are steered by, besides their conditioning.

    Attributes:
      null: what guidance steers away from (a negative prompt); None: unguided.
      chain: the links of guidance.
      middle: conditioning that has the picture but not the text, for ``instruct``; ``null`` has
        neither.
      kept: what of a picture stays, or None.
    """

    null: Conditioning | None = None
    chain: Chain = ()
    middle: Conditioning | None = None
    kept: Kept | None = None


def keep(denoise: Denoise | Stateful, kept: Kept, start: Array) -> Denoise | Stateful:
    """Puts the known part of a picture back, noised to the level, before each evaluation.

    As diffusers does for networks that were not trained to inpaint; but the first evaluation, at
    time ``start``, sees what sampling starts from. What comes out is pasted into the picture by
    ``draw``.
    """

    def wrap(step: Step) -> Step:
        def replaced(x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
            known = diffuse(kept.x0, kept.noise, level).astype(x.dtype)
            mixed = kept.mask * known + (1 - kept.mask) * x
            estimate, memory = step(jnp.where(level.t < start, mixed, x), level, memory)
            return estimate, memory

        return replaced

    return lift(denoise, wrap)


def draw(
    network: nn.Module,
    params: Any,
    sampler: Sampler,
    keys: jax.Array,
    shape: tuple[int, ...],
    cond: Conditioning,
    steering: Steering | None = None,
    *,
    picture: Array | None = None,
    x_init: Array | None = None,
    acceleration: Acceleration = NONE,
    devices: Sequence[jax.Device] | None = None,
    callback: Callback | None = None,
) -> jax.Array:
    """Latents [B, h, w, C] at the sampler's last level; the batch is shared among the devices.

    Args:
      network: a U-Net or DiT.
      params: its parameters.
      sampler: from a scheduler's config, or by hand.
      keys: [B] typed keys, of the noise.
      shape: (h, w, C), one example's.
      cond: conditioning, leaves [B, ...].
      steering: guidance and what is kept.
      picture: [B, h, w, C] to start from, noised to where the sampler starts (image to image),
        instead of from noise alone.
      x_init: [B, h, w, C] what to start from as it is, at the sampler's first level.
      acceleration: what makes evaluations cheaper. Another schedule of refreshes does not compile
        again.
      devices: by default all local ones.
      callback: as ``make_sampler``'s.
    """
    steering = Steering() if steering is None else steering
    if picture is not None:
        x_init = noised(picture, sampler.solver, keys)
    elif x_init is None:  # given in any case, so that with and without are compiled once
        x_init = image_noise(keys, shape) * np.float32(sampler.solver.init)
    compiled = _compiled(
        network,
        _comparable(sampler.prediction),
        _comparable(sampler.c_noise),
        _comparable(sampler.transform),
        shape,
        tuple(jax.local_devices() if devices is None else devices),
        callback,
    )
    start = np.float32(sampler.solver.level.t[0])
    weights = {"network": params, "acceleration": acceleration.at(sampler.solver.evaluations)}
    x = compiled(weights, sampler.solver, keys, cond, steering, start, x_init=x_init)
    if steering.kept is not None:
        kept = steering.kept
        x = kept.mask * kept.x0 + (1 - kept.mask) * x
    return x


@cache
def _compiled(
    network: nn.Module,
    prediction: Callable,
    c_noise: Callable,
    transform: Callable,
    shape: tuple[int, ...],
    devices: tuple[jax.Device, ...],
    callback: Callback | None,
) -> Draw:
    def networks(weights: dict[str, Any]) -> tuple[ConditionalDenoise, Acceleration]:
        def apply(x: Array, time: Array, cond: Conditioning) -> Array:
            return network.apply({"params": weights["network"]}, x, time, cond)

        return denoiser(apply, prediction, c_noise), weights["acceleration"]

    def guide(
        networks: tuple[ConditionalDenoise, Acceleration],
        cond: Conditioning,
        steering: Steering,
        start: Array,
    ) -> Denoise | Stateful:
        (denoise, acceleration), s = networks, steering
        branches = Branches(denoise, cond, s.null, s.middle, prediction, acceleration=acceleration)
        guided = transform(chain.guide(s.chain, branches))
        return guided if s.kept is None else keep(guided, s.kept, start)

    return make_sampler(networks, shape, guide, devices, callback=callback)


@dataclass(frozen=True)
class _Call:
    """A function with options that is equal to another with the same ones; ``partial`` is not."""

    function: Callable
    options: tuple[tuple[str, Any], ...]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args, **dict(self.options))


def _comparable(function: Callable) -> Callable:
    if isinstance(function, partial) and not function.args:
        return _Call(function.func, tuple(sorted(function.keywords.items())))
    return function
