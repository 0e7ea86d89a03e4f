"""Estimates kept in the data's range; ``Estimate.unclipped`` is what they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.denoiser import Denoise, Estimate, Stateful
from diffusion.levels import Array, NoiseLevel
from diffusion.sampling.guidance.transform import Step, lift, per_image, require


def clip(
    denoise: Denoise | Stateful, low: Array | float = -1.0, high: Array | float = 1.0
) -> Denoise | Stateful:
    """x_0_hat clipped to the data's range, () or [B] (DDPM, Ho et al., 2020)."""
    require(low < high, f"expected low < high, got low={low} and high={high}")
    return _on_x0(denoise, lambda x0: jnp.clip(x0, per_image(low, x0), per_image(high, x0)))


def dynamic_threshold(
    denoise: Denoise | Stateful, quantile: Array | float = 0.995, largest: Array | float = jnp.inf
) -> Denoise | Stateful:
    """x_0_hat clipped to [-s, s] and divided by s, so that it lies in [-1, 1].

    s is the quantile of |x_0_hat| over the image, but at least 1 and at most ``largest`` (Imagen,
    Saharia et al., 2022, section 2.3, which has no upper bound; diffusers' sample_max_value, 1 by
    default, at which this is ``clip``). For pixels, which lie in [-1, 1], not latents. Both numbers
    are () or [B].
    """
    require((quantile > 0) & (quantile <= 1), f"quantile must lie in (0, 1], got {quantile}")
    require(largest >= 1, f"largest must be at least 1, got {largest}")

    def threshold(x0_hat: Array) -> Array:
        size = jnp.abs(x0_hat).reshape(len(x0_hat), -1)
        share = jnp.broadcast_to(jnp.asarray(quantile, size.dtype), size.shape[:1])
        s = jnp.clip(jax.vmap(jnp.quantile)(size, share), 1.0, largest)
        s = per_image(s, x0_hat)
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
