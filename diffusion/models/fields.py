"""What networks' fields have in common: values per level, and checks that name a valid choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn


def per_level(value: Any, level: int) -> Any:
    """The level's entry of a field that holds one value for all levels or a tuple."""
    return value[level] if isinstance(value, (tuple, list)) else value


def nearest_divisors(number: int, target: int) -> str:
    """The divisors of ``number`` just below and above ``target``, as in "4 or 6"."""
    divisors = [d for d in range(1, number + 1) if number % d == 0]
    below = [d for d in divisors if d < target][-1:]
    return " or ".join(map(str, below + [d for d in divisors if d > target][:1]))


def check_at_least_one(net: nn.Module, *names: str) -> None:
    """Raises ValueError for a field that is neither None nor at least 1."""
    for name in names:
        value = getattr(net, name)
        if value is not None and value < 1:
            raise ValueError(f"{name}={value}; expected at least 1")


def check_even(net: nn.Module, *names: str) -> None:
    """Raises ValueError for a field that is neither None nor a positive even number."""
    for name in names:
        value = getattr(net, name)
        if value is not None and (value < 2 or value % 2):
            raise ValueError(f"{name}={value}; expected an even number, at least 2")


def check_heads(net: nn.Module) -> None:
    """Raises ValueError unless ``heads`` divides ``width``."""
    if net.width % net.heads:
        raise ValueError(
            f"width={net.width} cannot be split into heads={net.heads}; nearest: "
            f"{nearest_divisors(net.width, net.heads)}"
        )


def check_dropout(net: nn.Module) -> None:
    """Raises ValueError for a ``dropout`` outside [0, 1)."""
    if not 0 <= net.dropout < 1:
        raise ValueError(f"dropout={net.dropout}; expected a rate in [0, 1)")


def check_norm_groups(groups: int, widths: Sequence[int]) -> None:
    """Raises ValueError unless channels of each of the widths split into so many groups."""
    common = math.gcd(*widths)
    if groups < 1 or common % groups:
        raise ValueError(
            f"norm_groups={groups} does not divide every one of widths={widths}; "
            f"nearest: {nearest_divisors(common, groups)}"
        )


def check_image_size(image_size: int | Sequence[int], widths: Sequence[int]) -> None:
    """Raises ValueError unless the size, or height and width, halve once per level but the last."""
    factor = 2 ** (len(widths) - 1)
    for size in (image_size,) if isinstance(image_size, int) else image_size:
        if size < factor or size % factor:
            nearest = max(round(size / factor), 1) * factor
            raise ValueError(
                f"image size {size} is not divisible by {factor} = 2^(levels - 1) with "
                f"{len(widths)} levels (widths={tuple(widths)}); nearest: {nearest}"
            )
