"""diffusers' ``T2IAdapter``, full, full for SDXL and light."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from diffusion.models.t2i_adapter import T2IAdapter, full, full_xl, light
from diffusion.pretrained import fields as configs
from diffusion.pretrained.names import Names, dotted

KINDS = {"full_adapter": full, "full_adapter_xl": full_xl, "light_adapter": light}
DEFAULTS = {
    "in_channels": 3,
    "channels": (320, 640, 1280, 1280),
    "num_res_blocks": 2,
    "downscale_factor": 8,
}


def from_config(config: Mapping[str, Any]) -> T2IAdapter:
    """The module of a ``config.json``."""
    c = configs.fields(config, "T2IAdapter", DEFAULTS, {"adapter_type": tuple(KINDS)})
    kind = config.get("adapter_type", "full_adapter")
    widths = c.channels
    if kind == "light_adapter":  # its list leaves out the last of two equal stages
        widths = (*widths, widths[-1])
    fields = {"factor": c.downscale_factor, "hint_channels": c.in_channels}
    return KINDS[kind](widths=widths, blocks=c.num_res_blocks, **fields)


def to_config(net: T2IAdapter) -> dict[str, Any]:
    """The ``config.json`` from which diffusers builds the same network.

    Raises:
      ValueError: for a network that diffusers does not have.
    """
    widths, halved = list(net.widths), tuple(net.halved)
    kinds = [kind for kind, make in KINDS.items() if make(net.widths).halved == halved]
    if net.bottleneck:
        kinds = [kind for kind in kinds if kind == "light_adapter"]
    if not kinds:
        raise ValueError(
            f"halved={halved}: diffusers has adapters that halve before every stage but the first "
            "and, not of the light kind, before the third alone"
        )
    kind = kinds[0]
    if kind == "light_adapter" and widths[-1:] != widths[-2:-1]:
        raise ValueError(f"widths={net.widths}: the last two stages of a light adapter are equal")
    if kind == "full_adapter_xl" and len(set(widths[2:])) > 1:
        raise ValueError(f"widths={net.widths}: SDXL's adapter has one width from its third stage")
    return {
        "_class_name": "T2IAdapter",
        "adapter_type": kind,
        "in_channels": net.hint_channels,
        "channels": widths[:-1] if kind == "light_adapter" else widths,
        "num_res_blocks": net.blocks,
        "downscale_factor": net.factor,
    }


def names(net: T2IAdapter) -> Names:
    """The name table."""
    rule = dotted()
    return Names(lambda path: f"adapter.{rule(path)}")


def example(net: T2IAdapter) -> tuple[jax.ShapeDtypeStruct]:
    """The argument of ``net.init``, by shape."""
    side = net.factor * 2 ** sum(net.halved)
    return (configs.array(side, side, net.hint_channels),)
