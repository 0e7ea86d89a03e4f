"""How much memory a function will take, before anything is compiled or loaded."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

FREE = {"broadcast_in_dim", "iota", "reshape", "convert_element_type", "squeeze", "transpose"}
"""Primitives whose results XLA nearly always makes where they are read."""


def peak(function: Callable, *args: Any) -> int:
    """Bytes that intermediate results take at once, at most, without the arguments.

    From the order in which the function computes: a result takes memory from when it is made to
    when it is last read. XLA fuses some results away and reorders others; for this project's
    networks what it needs lies within about a factor of two.

    Args:
      function: anything that can be traced.
      args: arrays or ``jax.ShapeDtypeStruct``s, nested.
    """
    return _peak(jax.make_jaxpr(function)(*args).jaxpr)


def available(device: jax.Device) -> int | None:
    """Bytes that are free on a device, for a CPU those of the machine; None if it is not known."""
    stats = device.memory_stats() or {}
    if "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    info = Path("/proc/meminfo")
    if device.platform != "cpu" or not info.exists():
        return None
    lines = dict(line.split(":", 1) for line in info.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) * 1024


def _peak(jaxpr: Jaxpr) -> int:
    last = {}  # variable -> the equation that reads it last
    for i, equation in enumerate(jaxpr.eqns):
        last |= {v: i for v in equation.invars if not isinstance(v, Literal)}
    last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, Literal)}
    given = {*jaxpr.invars, *jaxpr.constvars}
    dying: dict[int, list] = {}
    for variable, i in last.items():
        if variable not in given:
            dying.setdefault(i, []).append(variable)
    live = highest = 0
    held = {}
    for i, equation in enumerate(jaxpr.eqns):
        within = max((_peak(inner) for inner in _inner(equation)), default=0)
        for variable in equation.outvars:
            free = equation.primitive.name in FREE
            held[variable] = 0 if free or variable not in last else _bytes(variable)
            live += held[variable]
        highest = max(highest, live, live - sum(held[v] for v in equation.outvars) + within)
        live -= sum(held.pop(v, 0) for v in dying.get(i, ()))
    return highest


def _inner(equation: Any) -> list[Jaxpr]:
    found = []
    for value in equation.params.values():
        for entry in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(entry, ClosedJaxpr):
                found.append(entry.jaxpr)
            elif isinstance(entry, Jaxpr):
                found.append(entry)
    return found


def _bytes(variable: Any) -> int:
    aval = variable.aval
    size = getattr(aval.dtype, "itemsize", 4)
    return math.prod(aval.shape) * size
