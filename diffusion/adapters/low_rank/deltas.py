"""What LoRA and its family add to a weight: dW of each kind, from its factors.

All are in PyTorch's layout (out, in, kh, kw), as files hold them, and ``in`` is what the layer
takes; ``merge`` changes the layout. An adapter is a dict

    {"network/down_blocks_0/attentions_0/proj_in/kernel": LowRank(...), "encoders/0/...": ...}

from the path of a parameter, in the component of a pipeline that holds it, to its delta.
"""

from __future__ import annotations

from collections.abc import Mapping

import flax.struct

from diffusion.levels import Array


@flax.struct.dataclass
class LowRank:
    """dW = scale B A, or with a core B C A (LoRA; LoCon; Tucker, Yeh et al., 2024).

    Attributes:
      down: A (r, in[, kh, kw]); with a core (r, in[, 1, 1]).
      up: B (out, r[, 1, 1]).
      scale: () alpha / r, or what stands for it.
      mid: C (r, r, kh, kw), or None.
    """

    down: Array
    up: Array
    scale: Array
    mid: Array | None = None


@flax.struct.dataclass
class Hadamard:
    """dW = scale (w1_a w1_b) * (w2_a w2_b), elementwise (LoHa; Hyeon-Woo et al., 2022).

    Attributes:
      w1_a, w2_a: (out, r); with cores (r, out).
      w1_b, w2_b: (r, in kh kw); with cores (r, in).
      scale: ().
      t1, t2: (r, r, kh, kw), or None.
    """

    w1_a: Array
    w1_b: Array
    w2_a: Array
    w2_b: Array
    scale: Array
    t1: Array | None = None
    t2: Array | None = None


@flax.struct.dataclass
class Kronecker:
    """dW = scale kron(w1, w2), each whole or a product of two (LoKr).

    Attributes:
      w1: (o1, i1), or its factors (w1_a (o1, r), w1_b (r, i1)).
      w2: (o2, i2[, kh, kw]), or its factors (w2_a, w2_b), or with a core (w2_a, w2_b, t2).
      scale: ().
    """

    w1: Array | tuple[Array, Array]
    w2: Array | tuple[Array, ...]
    scale: Array


@flax.struct.dataclass
class Full:
    """dW = scale * diff, of any parameter: kernels, biases, norms' scales."""

    diff: Array
    scale: Array


@flax.struct.dataclass
class Decomposed:
    """W' = m (W + dW) / ||W + dW|| (DoRA; Liu et al., 2024).

    The norm is over all axes but out, or all but in, whichever ``magnitude``'s shape says; no
    gradient flows through it.

    Attributes:
      delta: dW.
      magnitude: m (out, 1[, 1, 1]) or (1, in[, 1, 1]).
    """

    delta: LowRank | Hadamard | Kronecker | Full
    magnitude: Array


Delta = LowRank | Hadamard | Kronecker | Full | Decomposed
Deltas = Mapping[str, Delta]
