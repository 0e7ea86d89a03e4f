"""Couplings: which noise each example of a minibatch is mixed with.

A coupling is ``(x0, draw, label) -> noise``. ``draw(j)`` gives the j-th standard normal noise of
every example [B, ...]; without a coupling, training takes ``draw(0)``. What a coupled example is
mixed with depends on the example: that eases the task (Li et al., 2024, "Immiscible Diffusion") and
straightens the flow (Pooladian et al., 2023; Tong et al., 2024), and it costs something:

- E[eps | x_t] is no longer -sigma times the score of x_t. The velocity is right and deterministic
  samplers follow it; stochastic ones and Langevin correctors assume independent noise.
- Given its label, an example's noise is no longer standard normal (but with ``same_label``), and
  sampling starts from standard normal noise for every label (Cheng & Schwing, 2025).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from diffusion.errors import check_range
from diffusion.levels import Array
from diffusion.sharding import everywhere

Draw = Callable[[int], Array]
Coupling = Callable[[Array, Draw, Array | None], Array]


def independent(x0: Array, draw: Draw, label: Array | None = None) -> Array:
    """The first draw, whatever the example: diffusion as it was."""
    return draw(0)


def optimal_transport(
    x0: Array, draw: Draw, label: Array | None = None, group: int = 0, same_label: bool = False
) -> Array:
    """The noises draw(0) handed out within groups so that sum_i |x_i - eps_pi(i)|^2 is least.

    Minibatch optimal transport (Pooladian et al., 2023, "Multisample Flow Matching"; Tong et al.,
    2024, OT-CFM, alg. 3) and immiscible diffusion by linear assignment (Li et al., 2024) are this.
    The permutation pi is exact, by the Hungarian algorithm, in a time that grows with group^3: on
    the CPU 1 ms for 64, 2 ms for 128, 22 ms for 256.

    Args:
      x0: [B, ...].
      draw: see above.
      label: [B], used by ``same_label`` alone.
      group: successive examples that exchange noise, B or a divisor of it; 0 for all. Where it
        divides a device's share of the batch, the result does not depend on the devices.
      same_label: only examples of one label exchange noise, so that given the label noise stays
        standard normal (as in Cheng & Schwing, 2025, C2OT, for discrete conditions).
    """
    size = min(group or len(x0), len(x0))
    if group < 0 or len(x0) % size:
        fitting = [n for n in range(1, len(x0) + 1) if len(x0) % n == 0]
        near = [n for n in fitting if n < group][-1:] + [n for n in fitting if n > group][:1]
        raise ValueError(
            f"group={group} does not divide the {len(x0)} examples that a device takes at once; "
            f"nearest: {' or '.join(map(str, near))}"
        )
    noise = draw(0)
    x, e = (a.reshape(len(x0) // size, size, -1).astype(jnp.float32) for a in (x0, noise))
    gain = jnp.einsum("gid,gjd->gij", x, e, precision="highest")  # |x|^2 and |e|^2 do not matter
    if same_label:
        if label is None:
            raise ValueError("same_label=True needs labels, and these examples have none")
        other = label.reshape(-1, size)
        other = other[:, :, None] != other[:, None, :]
        # More than any sum of gains: to keep one's own noise is always allowed.
        far = 2 * size * jnp.abs(gain).max((1, 2), keepdims=True) + 1
        gain = gain - far * other
    # Whole at both ends: else XLA cuts the loops in between.
    rows, columns = everywhere(jax.vmap(optax.assignment.hungarian_algorithm)(everywhere(-gain)))
    order = jax.vmap(lambda r, c: jnp.zeros_like(c).at[r].set(c))(rows, columns)
    noise = noise.reshape(-1, size, *noise.shape[1:])
    return jax.vmap(lambda n, i: n[i])(noise, order).reshape(x0.shape)


def nearest(x0: Array, draw: Draw, label: Array | None = None, k: int = 4) -> Array:
    """Of k noises drawn for each example the one nearest to it (Li et al., 2025, KNN selection).

    No exchange between examples: cheap, parallel, the same on any devices. But noises together are
    no longer standard normal, only less far from it the more dimensions there are: the squared
    distance to x_0 has the survival function S(d)^k, with S that of the noncentral chi-squared
    distribution of |x_0 - eps|^2. Sampling starts from standard normal noise all the same.
    """
    check_range("k", k, 1, 256)
    best, least = draw(0), jnp.inf
    for j in range(k):
        noise = draw(j)
        distance = jnp.square(x0 - noise).sum(tuple(range(1, x0.ndim)), keepdims=True)
        best, least = jnp.where(distance < least, noise, best), jnp.minimum(distance, least)
    return best


CHOICES = {f.__name__: f for f in (independent, optimal_transport, nearest)}
