"""Which layers an adapter of weights is for: presets, and regular expressions over their paths."""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, TypeVar

from flax.traverse_util import flatten_dict

from diffusion.adapters.low_rank.merge import is_kernel
from diffusion.errors import check_range

_IMAGE, _TEXT = r"^(?!text/)(.*/)?", r"^text/(.*/)?"
PRESETS = {
    # to_q, ... of U-Nets; qkv, ... of diffusion transformers
    "attention": rf"{_IMAGE}(to_[qkv]|to_out_0|(attn|cross_attn)/(qkv|q|kv|proj))$",
    "transformer": rf"{_IMAGE}(attentions_\d+/.*|(attn|cross_attn|mlp)/\w+)$",
    "all": _IMAGE,
    "text_attention": rf"{_TEXT}self_attn/\w+$",
    "text_transformer": rf"{_TEXT}(self_attn|mlp)/\w+$",
}
"""Names of regular expressions: attention; attention, what feeds forward and what leads into a
transformer and out of it; all matrices and convolutions; and the first two of text encoders, which
no other preset takes. Paths are those within a network, "image/down_blocks_0/...", whose text
encoder is at "text"."""
T = TypeVar("T")


def layers(params: Any) -> dict[str, Any]:
    """The kernels of a network's parameters, by the paths of their layers."""
    flat = flatten_dict(params, sep="/")
    found = {path.rpartition("/")[0]: leaf for path, leaf in flat.items() if is_kernel(path)}
    return {path: leaf for path, leaf in found.items() if leaf.ndim > 1}


def choose(paths: Any, values: Mapping[str, T], name: str = "targets") -> dict[str, T]:
    """Layer -> the value of the first preset or pattern that it matches; others are left out.

    Args:
      paths: of layers.
      values: preset or regular expression, searched for in paths -> value.
      name: of the option, for errors.

    Raises:
      ValueError: a pattern is no regular expression, no layer matches it, or earlier ones take all
        that do.
    """
    chosen: dict[str, T] = {}
    for pattern, value in values.items():
        expression = re.compile(check(pattern, name))
        found = [path for path in paths if expression.search(path)]
        if not found:
            parts = {part for path in paths for part in (path, *path.split("/"))} | set(PRESETS)
            near = get_close_matches(pattern, sorted(parts), 3, 0.5) or list(paths)[:3]
            raise ValueError(
                f"{name}={pattern!r} is in no layer's path; presets are {', '.join(PRESETS)}; "
                f"nearest: {', '.join(near)}"
            )
        free = [path for path in found if path not in chosen]
        if not free:
            raise ValueError(f"{name}={pattern!r}: earlier patterns take all of its layers")
        chosen |= dict.fromkeys(free, value)
    return chosen


def check(pattern: str, name: str = "targets") -> str:
    """The regular expression of a preset or a pattern.

    Raises:
      ValueError: it is none.
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError) as error:
        raise ValueError(f"{name}={pattern!r} is no regular expression: {error}") from None
    return PRESETS.get(pattern, pattern)


def by_pattern(name: str, given: Mapping[str, float], low: float) -> dict[str, float]:
    """``given``, checked: patterns, and finite numbers from ``low``."""
    if not given:
        raise ValueError(f"{name}={given!r}: expected at least one pattern")
    for pattern, number in given.items():
        check(pattern, name)
        check_range(f"{name}: the number of {pattern!r}", number, low)
    return dict(given)
