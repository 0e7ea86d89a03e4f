"""Floating-point operations, counted from what a function traces to; and what devices can do.

Two per multiply-add of matrix products and convolutions; the rest (norms, activations, softmax) is
a few percent of such networks and left out, as in published counts. What is computed anew in the
backward pass (remat) counts again: it is work that the device does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr

from diffusion.models.kernels import winograd

PEAKS = {
    # Dense TFLOP/s of matrix products in (bfloat16, float32) per JAX device. float32 is what JAX
    # computes with by default: TF32 on NVIDIA from Ampere on, bfloat16 passes on TPUs. Sources:
    # NVIDIA's data sheets (half of the figures "with sparsity"), Google's Cloud TPU system pages.
    "NVIDIA H200": (989.4, 494.7),
    "NVIDIA H100 80GB HBM3": (989.4, 494.7),
    "NVIDIA H100 PCIe": (756.0, 378.0),
    "NVIDIA H100 NVL": (835.0, 417.5),
    "NVIDIA GH200": (989.4, 494.7),
    "NVIDIA B200": (2250.0, 1100.0),
    "NVIDIA A100": (312.0, 156.0),
    "NVIDIA L40S": (362.0, 183.0),
    "NVIDIA L4": (121.0, 60.0),
    "NVIDIA A10": (125.0, 62.5),
    "Tesla V100": (15.7, 15.7),  # its tensor cores know float16 alone
    "Tesla T4": (8.1, 8.1),
    "TPU v2": (22.5, 22.5),  # a device is one of the chip's two cores
    "TPU v3": (61.5, 61.5),
    "TPU v4": (275.0, 275.0),
    "TPU v5 lite": (197.0, 197.0),
    "TPU v5": (459.0, 459.0),
    "TPU v6 lite": (918.0, 918.0),
}
"""TFLOP/s by the beginning of ``device_kind``; the longest that fits counts."""


def count(function: Callable, *args: Any) -> int:
    """Floating-point operations of ``function(*args)``, without computing anything.

    A scan's body counts as often as it runs, of a ``cond`` the costliest branch, the body of a
    ``while`` loop, whose length nobody knows before it runs, once. The arguments are arrays or
    ``jax.ShapeDtypeStruct``s, nested.
    """
    return of(jax.make_jaxpr(function)(*args))


def of(traced: ClosedJaxpr) -> int:
    """The same of what has been traced already."""
    return _count(traced.jaxpr)


def peak(kind: str, dtype: str = "bfloat16") -> float | None:
    """FLOP/s of one device of this ``device_kind`` at most; None where it is not known."""
    fitting = [name for name in PEAKS if kind.startswith(name)]
    if not fitting:
        return None
    return PEAKS[max(fitting, key=len)][dtype != "bfloat16"] * 1e12


def _count(jaxpr: Jaxpr) -> int:
    return sum(_of(equation) for equation in jaxpr.eqns)


def _of(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        terms = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
        return 2 * equation.outvars[0].aval.size * terms
    if name == "conv_general_dilated":
        return _convolution(equation)
    if name == "scan":
        return params["length"] * _count(params["jaxpr"].jaxpr)
    if name == "cond":
        return max(_count(branch.jaxpr) for branch in params["branches"])
    if name == "shard_map":  # its body is what one device does
        return params["mesh"].size * _count(params["jaxpr"])
    if name.startswith("dot_product_attention"):
        return _fused_attention(equation)
    if name == winograd.three_by_three_p.name:
        operands = [variable.aval for variable in equation.invars]
        return count(partial(winograd.compute, **params), *operands)
    return sum(_count(inner) for inner in _inner(params))


def _convolution(equation: Any) -> int:
    kernel, numbers = equation.invars[1].aval.shape, equation.params["dimension_numbers"]
    _, channels, *spatial = (kernel[i] for i in numbers.rhs_spec)
    # Of a dilated input (a transposed convolution, a strided one's gradient) most terms are zeros
    # that were only put in between.
    dilation = math.prod(equation.params["lhs_dilation"])
    return 2 * equation.outvars[0].aval.size * channels * math.prod(spatial) // dilation


def _fused_attention(equation: Any) -> int:
    """cuDNN's kernels: of query [B, L, H, D], key [B, Lk, H', D]; five products backwards."""
    query, key = (variable.aval.shape for variable in equation.invars[:2])
    products = 5 if "bwd" in equation.primitive.name else 2
    return 2 * products * math.prod(query) * key[1]


def _inner(params: dict[str, Any]) -> Iterator[Jaxpr]:
    for value in params.values():
        for entry in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(entry, ClosedJaxpr):
                yield entry.jaxpr
            elif isinstance(entry, Jaxpr):
                yield entry
