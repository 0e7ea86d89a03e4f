"""Guidance by the gradient of a classifier that knows noised images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from diffusion.denoiser import Denoise, Estimate, Stateful
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.guidance.extrapolation import Scale
from diffusion.sampling.guidance.transform import Step, lift, move, per_image, score_to_x0

LogProb = Callable[[Array, NoiseLevel], Array]  # (x_t [B, ...], level) -> log p(y | x_t) [B]


def classifier_guidance(
    denoise: Denoise | Stateful, log_prob: LogProb, scale: Scale = 1.0
) -> Denoise | Stateful:
    """D + scale (sigma^2 / alpha) grad_x log p(y | x_t) (Dhariwal & Nichol, 2021, alg. 2).

    There eps_hat moves by -scale sigma grad. With an unconditional denoiser, the true p(y | x_t)
    and scale 1 this is the conditional denoiser, for any schedule; where alpha = 0, x_t tells
    nothing about y and nothing changes.

    Args:
      denoise: unconditional, or conditional (which they found better still).
      log_prob: each image's log-likelihood of its own label (or prompt, or anything).
      scale: () or [B], or a function of the level; 0 changes nothing.
    """

    def wrap(step: Step) -> Step:
        def guided(x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
            estimate, memory = step(x, level, memory)
            gradient = jax.grad(lambda x: log_prob(x, level).sum())(x)
            s = per_image(scale(level) if callable(scale) else scale, x)
            return move(estimate, s * score_to_x0(level, gradient)), memory

        return guided

    return lift(denoise, wrap)
