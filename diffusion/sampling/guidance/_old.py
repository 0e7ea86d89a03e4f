"""Guidance: transforms of a denoiser that give a denoiser.

x_t is the same in all terms, so guiding x_0_hat is the same as guiding eps or v.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from diffusion.conditioning import Conditioning, concatenate
from diffusion.denoiser import ConditionalDenoise, Denoise, Estimate, as_estimate
from diffusion.levels import Array, NoiseLevel


def conditional(denoise: ConditionalDenoise, cond: Conditioning) -> Denoise:
    """The denoiser with its conditioning filled in."""
    return lambda x, level: denoise(x, level, cond)


def classifier_free(
    denoise: ConditionalDenoise, cond: Conditioning, null: Conditioning, scale: Array | float
) -> Denoise:
    """D = D_null + scale (D_cond - D_null) (Ho & Salimans, 2022), in one call on twice the batch.

    Args:
      denoise: the conditional denoiser. Of learned variances, those of ``cond`` are kept.
      cond: the conditioning, batch [B].
      null: what to steer away from, with the same fields: ``conditioning.null_like(cond, ...)``,
        or a negative prompt.
      scale: () or [B]. 1 is purely conditional, and if it is the Python number 1, ``null`` is not
        evaluated; 0 is ``null`` alone.
    """
    if isinstance(scale, int | float) and scale == 1:
        return conditional(denoise, cond)
    both = concatenate(cond, null)

    def guided(x: Array, level: NoiseLevel) -> Array | Estimate:
        twice = NoiseLevel(*(jnp.concatenate([a, a]) if jnp.ndim(a) else a for a in level))
        estimate = as_estimate(denoise(jnp.concatenate([x, x]), twice, both))
        with_cond, with_null = jnp.split(estimate.x0, 2)
        w = jnp.asarray(scale, x.dtype)
        w = w.reshape(w.shape + (1,) * (x.ndim - w.ndim))
        nu = None if estimate.nu is None else jnp.split(estimate.nu, 2)[0]
        return Estimate(with_null + w * (with_cond - with_null), nu)

    return guided


def interval(guided: Denoise, plain: Denoise, low: float = 0.0, high: float = jnp.inf) -> Denoise:
    """``guided`` where low <= sigma / alpha <= high; elsewhere ``plain``, and only it is evaluated.

    Kynkäänniemi et al., 2024. For levels with leaves (), as samplers give.
    """
    if not 0 <= low < high:
        raise ValueError(f"expected 0 <= low < high, got low={low} and high={high}")

    def denoise(x: Array, level: NoiseLevel) -> Array | Estimate:
        inside = (low <= level.ratio) & (level.ratio <= high)
        return jax.lax.cond(
            inside, lambda *a: as_estimate(guided(*a)), lambda *a: as_estimate(plain(*a)), x, level
        )

    return denoise


def clip(denoise: Denoise, low: float = -1.0, high: float = 1.0) -> Denoise:
    """x_0_hat clipped to the data's range (DDPM, Ho et al., 2020)."""
    if not low < high:
        raise ValueError(f"expected low < high, got low={low} and high={high}")
    return _on_x0(denoise, lambda x0_hat: jnp.clip(x0_hat, low, high))


def dynamic_threshold(denoise: Denoise, quantile: float = 0.995) -> Denoise:
    """x_0_hat clipped to [-s, s] and divided by s; s >= 1 is a quantile of |x_0_hat| per image.

    Imagen (Saharia et al., 2022, section 2.3); for pixels, which lie in [-1, 1], not latents.
    """
    if not 0 < quantile <= 1:
        raise ValueError(f"quantile must lie in (0, 1], got {quantile}")

    def threshold(x0_hat: Array) -> Array:
        axes = tuple(range(1, x0_hat.ndim))
        s = jnp.maximum(jnp.quantile(jnp.abs(x0_hat), quantile, axes, keepdims=True), 1.0)
        return jnp.clip(x0_hat, -s, s) / s

    return _on_x0(denoise, threshold)


def _on_x0(denoise: Denoise, change: Callable[[Array], Array]) -> Denoise:
    def changed(x: Array, level: NoiseLevel) -> Estimate:
        estimate = as_estimate(denoise(x, level))
        unclipped = estimate.x0 if estimate.unclipped is None else estimate.unclipped
        return Estimate(change(estimate.x0), estimate.nu, unclipped)

    return changed
