"""The noise that training mixes with examples, and how much of it the target knows.

Example i's numbers depend on the key and on ``index[i]`` alone.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusion.errors import check_range
from diffusion.levels import Array


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """Standard normal noise, with two refinements that are off by default.

    Attributes:
      offset: strength of a noise that is the same in all of a channel's pixels, added to eps, so
        that the mean of an image is noised as quickly as its details (Guttenberg, 2023).
      perturbation: strength of a second noise, in x_t alone and not in the target (input
        perturbation, Ning et al., 2023).
    """

    offset: float = 0.0
    perturbation: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            check_range(name, value, 0, 100)  # 0 leaves it out

    def draw(self, key: Array, index: Array, x0: Array, j: int = 0) -> Array:
        """The j-th eps of each example [B, ...], in the shape and dtype of x0."""
        key = key if j == 0 else jax.random.fold_in(key, 2**30 + j)
        noise = normal(key, index, x0.shape[1:], x0.dtype)
        if self.offset:
            means = (*(1,) * (x0.ndim - 2), x0.shape[-1])  # one number per channel
            shared = normal(jax.random.fold_in(key, 2**31), index, means, x0.dtype)
            noise = noise + self.offset * shared
        return noise

    def perturb(self, key: Array, index: Array, noise: Array) -> Array:
        """What x_t holds for the noise eps [B, ...] of the target."""
        if not self.perturbation:
            return noise
        key = jax.random.fold_in(key, 2**31 + 1)
        return noise + self.perturbation * normal(key, index, noise.shape[1:], noise.dtype)


PLAIN = Gaussian()


def normal(key: Array, index: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
    """Standard normal numbers [B, *shape], example i's from ``key`` and index[i]."""
    # Drawn flat: XLA compiles that three times faster than drawing images under vmap.
    size = math.prod(shape)
    draw = jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), (size,), dtype))
    return draw(index).reshape(len(index), *shape)


CHOICES = {"gaussian": Gaussian}
