"""cuDNN's fused attention: the maps that it can compute on this machine, and its call.

It never writes the map [L, Lk] to memory, which at thousands of tokens is most of the cost of
attention (Dao et al., 2022). It has no forward-mode derivative: ``unfused`` turns it off for
functions that need one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from functools import cache, wraps
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.levels import Array

MULTIPLE = 8  # keys are filled up to a multiple of this

_allowed: ContextVar[bool] = ContextVar("allowed", default=True)


def suits(q: Array, k: Array, v: Array) -> bool:
    """Whether cuDNN computes attention without a mask of these [B, L, H, D] on this machine.

    It can on an NVIDIA GPU from Ampere on, in float16 or bfloat16, with heads whose width is a
    multiple of 8 and at most 256 (from Hopper on; 128 before), outside of ``unfused``.
    """
    widest = widest_head()
    half = all(a.dtype in (jnp.float16, jnp.bfloat16) and a.dtype == q.dtype for a in (q, k, v))
    return _allowed.get() and half and q.shape[-1] % 8 == 0 and q.shape[-1] <= widest


@cache
def widest_head() -> int:
    """The largest head width on the default device; 0 if there is no such kernel."""
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return 0
    capability = float(device.compute_capability)
    return 256 if capability >= 9 else 128 if capability >= 8 else 0


def attend_cudnn(q: Array, k: Array, v: Array) -> Array:
    """softmax(q k^T / sqrt(D)) v; for 77 tokens of text, 80 keys of which 77 count.

    The kernels need an even number of keys. The number of real keys excludes those that fill up; a
    mask would be added to all logits.
    """
    lengths, missing = None, -k.shape[1] % MULTIPLE
    if missing:
        lengths = jnp.full(len(k), k.shape[1], jnp.int32)
        k, v = (jnp.pad(a, ((0, 0), (0, missing), (0, 0), (0, 0))) for a in (k, v))
    return jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def unfused(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with attention that also has a forward-mode derivative (``jax.jvp``).

    It applies to attention without an ``implementation``. ``function`` must not be jitted by
    itself, since jit would use again what it traced before.
    """

    @wraps(function)
    def changed(*args: Any, **kwargs: Any) -> Any:
        token = _allowed.set(False)
        try:
            return function(*args, **kwargs)
        finally:
            _allowed.reset(token)

    return changed
