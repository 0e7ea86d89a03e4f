"""Editing pictures with any model: image to image, inpainting, interpolation.

Inpainting transforms a denoiser, so that every solver, guidance and schedule can be used with it.
Where D is the known picture, x_t follows the forward process of that picture: solvers reproduce
points exactly, stochastic ones with new noise at each step, deterministic ones with the initial
noise. ``solvers.repaint`` resamples, ``measurements`` serve super-resolution and deblurring, and
``inversion`` finds a picture's noise.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from diffusion.denoiser import Denoise, Estimate, Stateful
from diffusion.levels import Array, NoiseLevel, diffuse
from diffusion.sampling.guidance.transform import Step, lift, on_estimate
from diffusion.sampling.measurements import Measure
from diffusion.sampling.sample import image_noise, sample
from diffusion.sampling.tables import Solver


def noised(x0: Array, solver: Solver, keys: jax.Array) -> Array:
    """alpha x_0 + sigma eps at ``solver.level[0]``: ``x_init`` for a start from a picture.

    The noise is ``sample``'s initial noise for these keys [B]: with a solver that starts at
    alpha = 0, sigma = 1 the result is that of a start from noise. The pictures x0 [B, ...] should
    be 0 at unknown pixels; the solver's grid is ``grids.partial(grid, strength)``.
    """
    first = NoiseLevel(*(jnp.asarray(leaf[0], x0.dtype) for leaf in solver.level))
    return diffuse(x0, image_noise(keys, x0.shape[1:]).astype(x0.dtype), first)


def image_to_image(
    denoise: Denoise | Stateful, solver: Solver, keys: jax.Array, x0: Array
) -> Array:
    """Adds noise to pictures x0 [B, ...] up to the solver's first level and samples from there.

    SDEdit (Meng et al., 2021): ``solver(grids.partial(grid, strength))``. A low strength keeps the
    picture's layout, strength 1 almost nothing.
    """
    return sample(denoise, solver, keys, x0.shape[1:], x_init=noised(x0, solver, keys))


def inpaint(
    denoise: Denoise | Stateful,
    known: Array,
    mask: Array,
    *,
    noise: Array | None = None,
    start: Array | float = jnp.inf,
) -> Denoise | Stateful:
    """D := mask known + (1 - mask) D, which keeps the known pixels and paints the others.

    For one step of DDPM this is RePaint's (Lugmayr et al., 2022, eq. 8), with the known part of x_s
    drawn given x_t. Sampling starts from ``noised(mask * known, solver, keys)``. Learned variances
    of known pixels become the posterior's.

    Args:
      known: [B, ...] or broadcastable; its values where mask = 0 have no effect.
      mask: broadcastable to x, 1 at known pixels, 0 at others; values between mix the two.
      noise: [B, ...] noise of the known pixels. With it x itself is mixed before each evaluation,
        and D stays as it is: this is diffusers' way for networks that were not trained to inpaint,
        in which the known part keeps its noise under stochastic solvers too. The result is then
        to be pasted into the picture.
      start: with ``noise``, the time of the first evaluation, which sees x as it is.
    """
    if noise is not None:

        def mixed(step: Step, x: Array, level: NoiseLevel, memory: Any) -> tuple[Estimate, Any]:
            x_known = diffuse(known, noise, level).astype(x.dtype)
            seen = jnp.where(level.t < start, mask * x_known + (1 - mask) * x, x)
            return step(seen, level, memory)

        return lift(denoise, mixed)

    def mix(m: Array, x0: Array) -> Array:
        return m * jnp.where(m > 0, known, 0).astype(x0.dtype) + (1 - m) * x0

    def change(x: Array, level: NoiseLevel, e: Estimate) -> Estimate:
        m = jnp.asarray(mask, e.x0.dtype)
        nu = None if e.nu is None else (1 - m) * e.nu
        return Estimate(mix(m, e.x0), nu, None if e.unclipped is None else mix(m, e.unclipped))

    return on_estimate(denoise, change)


def consistent(
    denoise: Denoise | Stateful, y: Array, measure: Measure, inverse: Measure
) -> Denoise | Stateful:
    """D := D + A^+ (y - A D), which agrees with a noiseless measurement y = A x_0.

    DDNM (Wang et al., 2022, eq. 13): the model decides only in the null space of the linear
    measurement, such as ``measurements.average_pool`` with the inverse ``repeat_pixels``. No
    gradient is taken. ``inpaint`` is the case of a mask.
    """

    def project(x0: Array) -> Array:
        return x0 + inverse(y - measure(x0))

    def change(x: Array, level: NoiseLevel, e: Estimate) -> Estimate:
        unclipped = None if e.unclipped is None else project(e.unclipped)
        return Estimate(project(e.x0), e.nu, unclipped)

    return on_estimate(denoise, change)


def slerp(a: Array, b: Array, weight: Array | float) -> Array:
    """Along the great circle from a (weight 0) to b (weight 1), each image by itself.

    sin((1 - w) theta) / sin(theta) a + sin(w theta) / sin(theta) b, with theta the angle between a
    and b (Shoemake, 1985; for x_T, DDIM, Song et al., 2020, section 5.3). Unlike a straight line it
    keeps the norm of noise. It is a straight line where a and b are parallel, and where they are
    opposite, since the great circle is then not unique. a and b are [B, ...] and not 0, weights ()
    or [B].
    """
    axes, keep = tuple(range(1, a.ndim)), (-1,) + (1,) * (a.ndim - 1)
    u, v = (c / jnp.sqrt(jnp.sum(c**2, axes, keepdims=True)) for c in (a, b))

    def norm(c: Array) -> Array:
        square = jnp.sum(c**2, axes)
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)

    theta = 2 * jnp.arctan2(norm(u - v), norm(u + v))  # accurate near 0 and pi, as arccos is not
    straight = theta > jnp.pi - 1e-3
    theta = jnp.where(straight, 0, theta)
    w = jnp.broadcast_to(jnp.asarray(weight, a.dtype), theta.shape)

    def share(w: Array) -> Array:  # sin(w theta) / sin(theta), w at theta = 0
        return (w * jnp.sinc(w * theta / jnp.pi) / jnp.sinc(theta / jnp.pi)).reshape(keep)

    return share(1 - w) * a + share(w) * b


def between(a: Array, b: Array, count: int) -> Array:
    """[count >= 2, B, ...]: evenly spaced along ``slerp`` from a to b, for x_T or latents."""
    if count < 2:
        raise ValueError(f"count must be at least 2, the two ends, got {count}")
    return jnp.stack([slerp(a, b, w) for w in jnp.linspace(0, 1, count)])
