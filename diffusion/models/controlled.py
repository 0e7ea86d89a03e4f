"""A U-Net with ControlNets and T2I-Adapters around it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning, Hint
from diffusion.levels import Array
from diffusion.models.controlnet import ControlNet
from diffusion.models.fields import per_level
from diffusion.models.surroundings import Around, around
from diffusion.models.t2i_adapter import T2IAdapter
from diffusion.models.unet import UNet


class Controlled(Around):
    """``network``, to whose features each of ``nets`` adds what it reads from its hint.

    Attributes:
      nets: ControlNets and T2I-Adapters, one for each of ``cond.hints``, in the same order.
    """

    nets: tuple[ControlNet | T2IAdapter, ...] = ()
    column: ClassVar[str] = "hint"

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


def check_fit(net: ControlNet | T2IAdapter, unet: UNet, factor: int) -> None:
    """Raises ValueError unless the net's residuals fit the U-Net's features.

    ``factor`` pixels of a picture's side become one of what the U-Net sees.
    """
    levels, own = len(unet.widths), tuple(net.widths)
    if isinstance(net, T2IAdapter):
        expected = (*unet.widths, unet.widths[-1])[: len(own)]
        if own != expected or len(own) < levels:
            raise ValueError(
                f"a T2I-Adapter for widths {own} does not fit a U-Net with widths "
                f"{tuple(unet.widths)}"
            )
        halved = np.cumsum(net.halved)
        for i, times in enumerate(halved):
            # Features are added before a level halves, or, without attention, after it.
            after = i < levels - 1 and unet.level_kinds("attention", i)[-1] == 0
            side = factor * 2 ** (min(i, levels - 1) + after)
            if net.factor * 2**times != side:
                raise ValueError(
                    f"a T2I-Adapter whose stage {i + 1} has squares of {net.factor * 2**times} "
                    f"pixels does not fit a U-Net that has squares of {side} there"
                )
        return
    halvings = 2 ** (len(net.hint_widths) - 1)
    if halvings != factor:
        raise ValueError(
            f"a ControlNet for squares of {halvings} pixels (hint_widths={tuple(net.hint_widths)}) "
            f"does not fit a U-Net for squares of {factor}"
        )
    blocks = tuple(
        tuple(per_level(n.blocks, level) for level in range(len(n.widths))) for n in (net, unet)
    )
    compared = {"widths": (own, tuple(unet.widths)), "blocks": blocks}
    needed = ["context_width"] if net.attends_to_context else []
    needed += ["added_embedding", "added_width"] if net.added_embedding else []
    compared |= {field: (getattr(net, field), getattr(unet, field)) for field in needed}
    for field, (theirs, ours) in compared.items():
        if None not in (theirs, ours) and theirs != ours:
            raise ValueError(
                f"a ControlNet with {field}={theirs} does not fit a U-Net with {field}={ours}"
            )


def nets_around(network: nn.Module) -> tuple[ControlNet | T2IAdapter, ...]:
    """The nets that a network has already; none of others."""
    return next((each.nets for each in around(network) if isinstance(each, Controlled)), ())


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
