"""A U-Net with ControlNets around it."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax.numpy as jnp

from diffusion.conditioning import Conditioning, Hint
from diffusion.levels import Array
from diffusion.models.text_to_image import Around


class Controlled(Around):
    """``network``, to whose features each of ``nets`` adds what it reads from its hint.

    Attributes:
      nets: as many ControlNets as ``cond.hints`` has hints, in the same order.
    """

    nets: tuple[nn.Module, ...] = ()

    def __call__(
        self,
        x: Array,
        time: Array,
        cond: Conditioning,
        train: bool = False,
        *,
        features: Sequence[int] = (),
    ) -> Array | tuple[Array, tuple[Array, ...]]:
        """As ``UNet``'s.

        Raises:
          ValueError: there are more or fewer hints than nets.
        """
        if len(cond.hints) != len(self.nets):
            raise ValueError(f"{len(cond.hints)} hints for {len(self.nets)} ControlNets")
        inner, total = cond.replace(hints=()), None
        for net, hint in zip(self.nets, cond.hints):
            seen = inner.replace(image_prompts=())
            if net.in_channels == x.shape[-1]:  # a net for text to image, beside inpainting
                seen = seen.replace(image=None)
            residuals = scaled(net(x, time, seen, hint.image, train), hint, time)
            total = residuals if total is None else [a + b for a, b in zip(total, residuals)]
        options = {"features": features} if features else {}
        return self.network(x, time, inner, train=train, control=total, **options)


def scaled(residuals: Sequence[Array], hint: Hint, time: Array) -> list[Array]:
    """Residuals [B, h, w, C], times the hint's scales while it acts at c_noise ``time`` [B]."""
    scale = jnp.ones((len(time), 1)) if hint.scale is None else hint.scale
    if scale.shape[1] not in (1, len(residuals)):
        raise ValueError(
            f"{scale.shape[1]} scales for {len(residuals)} residuals; expected 1 or as many"
        )
    if hint.first is not None:
        scale = jnp.where(((hint.first <= time) & (time <= hint.last))[:, None], scale, 0)
    scale = jnp.broadcast_to(scale, (len(time), len(residuals)))[..., None, None, None]
    # A factor of 0 leaves examples as they are, whatever the net makes of them.
    return [jnp.where(scale[:, i] == 0, 0, scale[:, i] * r) for i, r in enumerate(residuals)]
