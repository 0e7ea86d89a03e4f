"""Estimates kept in the data's range; ``Estimate.unclipped`` is what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from diffusion.denoiser import Denoise, Estimate, Stateful
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.guidance.transform import Step, lift


def clip(denoise: Denoise | Stateful, low: float = -1.0, high: float = 1.0) -> Denoise | Stateful:
    """x_0_hat clipped to the data's range (DDPM, Ho et al., 2020)."""
    if not low < high:
        raise ValueError(f"expected low < high, got low={low} and high={high}")
    return _on_x0(denoise, lambda x0_hat: jnp.clip(x0_hat, low, high))


def dynamic_threshold(
    denoise: Denoise | Stateful, quantile: float = 0.995, largest: float = jnp.inf
) -> Denoise | Stateful:
    """x_0_hat clipped to [-s, s] and divided by s, so that it lies in [-1, 1].

    s is the quantile of |x_0_hat| over the image, but at least 1 and at most ``largest`` (Imagen,
    Saharia et al., 2022, section 2.3, which has no upper bound; diffusers' sample_max_value, 1 by
    default, at which this is ``clip``). For pixels, which lie in [-1, 1], not latents.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must lie in (0, 1], got {quantile}")
    if not largest >= 1:
        raise ValueError(f"largest must be at least 1, got {largest}")

    def threshold(x0_hat: Array) -> Array:
        axes = tuple(range(1, x0_hat.ndim))
        s = jnp.quantile(jnp.abs(x0_hat), quantile, axes, keepdims=True)
        s = jnp.clip(s, 1.0, largest)
        return jnp.clip(x0_hat, -s, s) / s

    return _on_x0(denoise, threshold)


def _on_x0(denoise: Denoise | Stateful, change: Callable[[Array], Array]) -> Denoise | Stateful:
    def wrap(step: Step) -> Step:
        def changed(x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
            estimate, memory = step(x, level, memory)
            unclipped = estimate.x0 if estimate.unclipped is None else estimate.unclipped
            return Estimate(change(estimate.x0), estimate.nu, unclipped), memory

        return changed

    return lift(denoise, wrap)
