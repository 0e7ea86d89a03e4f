"""A U-Net with ControlNets and T2I-Adapters around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from diffusion.conditioning import Conditioning, Hint
from diffusion.levels import Array
from diffusion.models.controlnet import ControlNet
from diffusion.models.t2i_adapter import T2IAdapter
from diffusion.models.text_to_image import Around


class Controlled(Around):
    """``network``, to whose features each of ``nets`` adds what it reads from its hint.

    Attributes:
      nets: ControlNets and T2I-Adapters, one for each of ``cond.hints``, in the same order.
    """

    nets: tuple[ControlNet | T2IAdapter, ...] = ()

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
            raise ValueError(f"{len(cond.hints)} hints for {len(self.nets)} nets")
        inner, control, levels = cond.replace(hints=()), None, None
        for net, hint in zip(self.nets, cond.hints):
            if isinstance(net, T2IAdapter):
                own = net(hint.image) if hint.features is None else hint.features
                levels = _sum(levels, scaled(own, hint, time))
            else:
                seen = inner.replace(image_prompts=())
                if net.in_channels == x.shape[-1]:  # a net for text to image, beside inpainting
                    seen = seen.replace(image=None)
                own = net(x, time, seen, hint.image, train)
                control = _sum(control, scaled(own, hint, time))
        options: dict[str, Any] = {"features": features} if features else {}
        options |= {} if control is None else {"control": control}
        options |= {} if levels is None else {"control_levels": levels}
        return self.network(x, time, inner, train=train, **options)


def _sum(total: list[Array] | None, more: list[Array]) -> list[Array]:
    if total is None:
        return more
    if len(total) != len(more):
        raise ValueError(f"nets with {len(total)} and {len(more)} features do not go together")
    return [a + b for a, b in zip(total, more)]


def scaled(residuals: Sequence[Array], hint: Hint, time: Array) -> list[Array]:
    """Residuals [B, h, w, C], times the hint's scales while it acts at c_noise ``time`` [B].

    Raises:
      ValueError: there are neither one scale nor as many as residuals.
    """
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
