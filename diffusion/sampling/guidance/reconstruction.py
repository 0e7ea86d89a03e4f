"""Guidance by a measurement y = A(x_0) + noise: inpainting, super-resolution, deblurring.

Bayes gives the posterior's score as grad log p(x_t) + grad log p(y | x_t), and the methods differ
in what they take for the second: x_0 given x_t has mean x_0_hat and a covariance V that is not
known, so that y given x_t is taken to be N(A(x_0_hat), S), with S a number or A V A^T + noise.
Tweedie's second moment V = (sigma^2 / alpha) dx_0_hat/dx_t makes the correction of x_0_hat

    V A^T S^-1 (y - A(x_0_hat)),

whose V A^T is a vector-Jacobian product through the denoiser: one backward pass.

Clip after these, not before: a clipped pixel has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.denoiser import Denoise, Estimate, Stateful
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.guidance.transform import Step, dot, lift, move, per_image, score_to_x0
from diffusion.sampling.measurements import Measure

Precision = Callable[[NoiseLevel, Array], Array]  # (level, ||y - A(x_0_hat)|| [B]) -> () or [B]


def reconstruction(
    denoise: Denoise | Stateful, measure: Measure, y: Array, precision: Precision
) -> Denoise | Stateful:
    """D + (sigma^2 / alpha) p J^T (y - A(D)), with J the Jacobian of A(D(x_t)).

    The gradient of -p/2 ||y - A(x_0_hat(x_t))||^2, p held fixed. A need only be differentiable.

    Args:
      denoise: the prior's denoiser, differentiable in x.
      measure: A, [B, ...] -> [B, ...], each image by itself.
      y: what was measured, with ``measure``'s shape.
      precision: p >= 0, how sure x_t makes of the measurement: ``dps``, ``pigdm`` or ``video``.
    """

    def gradient(residual: Array, pull: Callable, level: NoiseLevel, x0: Array) -> Array:
        p = precision(level, jnp.sqrt(dot(residual, residual)))
        return pull(per_image(p, residual) * residual)[0]

    return _guided(denoise, measure, y, gradient)


def moment_matched(
    denoise: Denoise | Stateful,
    measure: Measure,
    y: Array,
    noise_std: float,
    iterations: int = 3,
) -> Denoise | Stateful:
    """D + V A^T (A V A^T + noise_std^2)^-1 (y - A(D)), V Tweedie's covariance, A linearised at D.

    Exact for a Gaussian prior and a linear A; nothing to tune (Boys et al., 2023; MMPS, Rozet et
    al., 2024). The system is solved by conjugate gradients, each image's by itself; every one of
    the ``iterations`` >= 1 is a backward pass through the denoiser. As many as y has numbers solve
    it exactly, a few do for images. ``noise_std`` > 0 is that of the measurement; the other
    arguments are those of ``reconstruction``.
    """
    if not noise_std > 0:
        raise ValueError(f"noise_std must be positive (0.01, say), got {noise_std}")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")

    def gradient(residual: Array, pull: Callable, level: NoiseLevel, x0: Array) -> Array:
        _, push = jax.linearize(measure, x0)

        def covariance(p: Array) -> Array:
            return push(score_to_x0(level, pull(p)[0])) + noise_std**2 * p

        return pull(_conjugate_gradients(covariance, residual, iterations))[0]

    return _guided(denoise, measure, y, gradient)


def dps(zeta: Array | float | Callable[[NoiseLevel], Array] = 1.0) -> Precision:
    """2 zeta / ||y - A(x_0_hat)||: the score of DPS (Chung et al., 2022, alg. 1).

    DPS takes its gradient off a DDPM step's result, zeta' grad ||.||^2 / ||.||. The mean of a step
    with variance beta moves by beta / sqrt(1 - beta) times the score, so that its zeta' is
    zeta beta / sqrt(1 - beta) here; zeta may be a function of the level.
    """

    def precision(level: NoiseLevel, norm: Array) -> Array:
        factor = zeta(level) if callable(zeta) else zeta
        return 2 * factor / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)

    return precision


def pigdm(noise_std: float, data_std: float = 0.5, gain: float = 1.0) -> Precision:
    """1 / (gain r^2 + noise_std^2), r^2 = sigma^2 s^2 / (alpha^2 s^2 + sigma^2).

    PiGDM (Song et al., 2023), for any schedule. r^2 is the variance of x_0 given x_t for Gaussian
    data of standard deviation s = data_std, for which, with A A^T = gain I, the correction is
    exact. gain is 1 for inpainting and 1 / n for means of n pixels.
    """
    if not (noise_std >= 0 and data_std > 0 and gain > 0):
        raise ValueError(
            "expected noise_std >= 0, data_std > 0 and gain > 0, got "
            f"{noise_std}, {data_std} and {gain}"
        )

    def precision(level: NoiseLevel, norm: Array) -> Array:
        data, noise = (level.alpha * data_std) ** 2, level.sigma**2
        return 1 / (gain * noise * data_std**2 / (data + noise) + noise_std**2)

    return precision


def video(weight: float = 1.0) -> Precision:
    """weight alpha^2 / sigma^2 (video diffusion models, Ho et al., 2022, eq. 7).

    The one whose correction, weight alpha J^T (y - A(x_0_hat)), stays small where there is hardly
    any signal, whatever the network's Jacobian.
    """
    return lambda level, norm: weight * (level.alpha / level.sigma) ** 2


def _guided(
    denoise: Denoise | Stateful, measure: Measure, y: Array, gradient: Callable[..., Array]
) -> Denoise | Stateful:
    """Moves the score by gradient(y - A(D), the product with J^T, level, D)."""

    def evaluate(step: Step, x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
        def predict(x: Array) -> tuple[Array, tuple[Estimate, Any]]:
            estimate, after = step(x, level, memory)
            return measure(estimate.x0), (estimate, after)

        predicted, pull, (estimate, after) = jax.vjp(predict, x, has_aux=True)
        if predicted.shape != jnp.shape(y):
            raise ValueError(f"y has shape {jnp.shape(y)}, but measure gives {predicted.shape}")
        score = gradient(y - predicted, pull, level, estimate.x0)
        return move(estimate, score_to_x0(level, score)), after

    return lift(denoise, evaluate)


def _conjugate_gradients(apply: Callable[[Array], Array], b: Array, iterations: int) -> Array:
    """u with apply(u) = b [B, ...], apply symmetric and positive for each image by itself."""

    def ratio(a: Array, c: Array) -> Array:  # [B] / [B]; 0 where there is nothing left to do
        return per_image(jnp.where(c > 0, a / jnp.where(c > 0, c, 1), 0), b)

    def iterate(state: tuple, _: None) -> tuple[tuple, None]:
        u, r, p, rr = state
        applied = apply(p)
        step = ratio(rr, dot(p, applied))
        u, r = u + step * p, r - step * applied
        left = dot(r, r)
        return (u, r, r + ratio(left, rr) * p, left), None

    start = (jnp.zeros_like(b), b, b, dot(b, b))
    return jax.lax.scan(iterate, start, None, length=iterations)[0][0]
