"""Peak signal-to-noise ratio of pictures against their references."""

from __future__ import annotations

import jax.numpy as jnp

from diffusion.levels import Array


def psnr(x: Array, reference: Array, span: float = 2.0) -> Array:
    """10 log10(span^2 / mean squared error) in dB, [B] for pictures [B, ...] in a range of width
    ``span``, which is 2 for [-1, 1]; inf if equal."""
    x, reference = jnp.asarray(x), jnp.asarray(reference)
    if x.shape != reference.shape:
        raise ValueError(f"pictures have shape {x.shape}, their references {reference.shape}")
    error = jnp.mean((x - reference) ** 2, axis=tuple(range(1, x.ndim)))
    return 10 * jnp.log10(span**2 / error)
