"""The per-level fields of U-Nets: how they are read, and what fits together."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from diffusion.models.unet_encoder import Encoder

AttentionKind = int | Literal["self"]


def per_level(value: Any, level: int) -> Any:
    """The level's entry of a field that holds one value for all levels or a tuple."""
    return value[level] if isinstance(value, (tuple, list)) else value


def level_kinds(net: Encoder, field: str, level: int) -> tuple[AttentionKind, ...]:
    """What follows each of a level's ResNet blocks, by the field "attention" or "up_attention"."""
    count = per_level(net.blocks, level) + (field == "up_attention")
    kind = per_level(getattr(net, field), level)
    return tuple(kind) if isinstance(kind, (tuple, list)) else (kind,) * count


def all_kinds(net: Encoder) -> Iterator[tuple[AttentionKind, int]]:
    """Every attention layer's kind and level."""
    for field in ("attention", "up_attention"):
        if getattr(net, field, None) is not None:
            for level in range(len(net.widths)):
                yield from ((kind, level) for kind in level_kinds(net, field, level))
    if net.mid_blocks > 1:
        yield net.mid_attention, len(net.widths) - 1


def validate(net: Encoder) -> None:
    """Raises ValueError for fields that do not fit together."""
    levels = len(net.widths)
    if levels == 0 or any(width < 2 or width % 2 for width in net.widths):
        raise ValueError(f"widths={net.widths}; expected at least one level, of even widths >= 2")
    for field in (
        *("blocks", "attention", "up_attention", "num_heads", "head_width"),
        "only_cross_attention",
    ):
        value = getattr(net, field, None)
        if isinstance(value, (tuple, list)) and len(value) != levels:
            raise ValueError(
                f"{field}={value} has {len(value)} entries; expected one value or {levels}, "
                f"as many as widths={net.widths}"
            )
    for level in range(levels):
        if per_level(net.blocks, level) < 1:
            raise ValueError(f"blocks={net.blocks}; expected at least 1 ResNet block per level")
    if net.mid_blocks < 0:
        raise ValueError(f"mid_blocks={net.mid_blocks}; expected at least 0")
    for field in ("attention", "up_attention"):
        for level in range(levels) if getattr(net, field, None) is not None else ():
            kinds = level_kinds(net, field, level)
            count = per_level(net.blocks, level) + (field == "up_attention")
            if len(kinds) != count:
                raise ValueError(
                    f"{field}={getattr(net, field)}: level {level} has {count} ResNet blocks there,"
                    f" and {kinds} {len(kinds)} entries"
                )
    for kind, _ in all_kinds(net):
        if kind != "self" and not (isinstance(kind, int) and kind >= 0):
            raise ValueError(
                f"attention={net.attention}, mid_attention={net.mid_attention!r}: {kind!r} is "
                "neither 0 (none), 'self' nor a number of transformer blocks"
            )
    common = math.gcd(*net.widths)
    if net.norm_groups < 1 or common % net.norm_groups:
        raise ValueError(
            f"norm_groups={net.norm_groups} does not divide every one of widths={net.widths}; "
            f"nearest: {_nearest_divisor(common, net.norm_groups)}"
        )
    if net.num_heads is not None and net.head_width is not None:
        raise ValueError(
            f"num_heads={net.num_heads} and head_width={net.head_width}; give at most one"
        )
    for kind, level in all_kinds(net):
        for field in ("num_heads", "head_width"):
            value, width = per_level(getattr(net, field), level), net.widths[level]
            if kind != 0 and value is not None and (value < 1 or width % value):
                raise ValueError(
                    f"{field}={getattr(net, field)}: {value} does not divide width {width} of "
                    f"level {level}; nearest: {_nearest_divisor(width, value)}"
                )
    if net.num_classes is not None and net.num_classes < 1:
        raise ValueError(f"num_classes={net.num_classes}; expected None or at least 1")
    for field in ("in_channels", "context_width", "added_width"):
        value = getattr(net, field)
        if value is not None and value < 1:
            raise ValueError(f"{field}={value}; expected None or at least 1")
    for field in ("time_width", "time_id_width", "guidance_width"):
        value = getattr(net, field)
        if value is not None and (value < 2 or value % 2):
            raise ValueError(f"{field}={value}; expected an even number")
    if not 0 <= net.dropout < 1:
        raise ValueError(f"dropout={net.dropout}; expected a rate in [0, 1)")


def _nearest_divisor(number: int, wanted: int) -> int:
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    return min(divisors, key=lambda d: abs(d - wanted))
