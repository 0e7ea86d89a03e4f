"""What the tensors of a layer are in an adapter's file, and the deltas that they make.

What a tensor is follows from its key's ending, which ``split`` parts from the layer's name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from diffusion.adapters.low_rank.deltas import (
    Decomposed,
    Delta,
    Full,
    Hadamard,
    Kronecker,
    LowRank,
)
from diffusion.pretrained.adapters.layers import Layer

_NAMED = r"(?:\.[\w-]+)?"  # PEFT may put the adapter's name here
_FORMER = r"(?:\.lora|_lora|\.lora_linear_layer)"
_LOHA = tuple(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2"))
_LOKR = tuple(f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2"))
_VERBATIM = ("dora_scale", "diff", "diff_b", "w_norm", "b_norm", *_LOHA, *_LOKR)
ENDINGS = tuple(
    (re.compile(f"(.+?){ending}"), part)
    for ending, part in (
        (rf"(?:\.lora_A{_NAMED}|\.lora_down|{_FORMER}\.down)\.weight", "down"),
        (rf"(?:\.lora_B{_NAMED}|\.lora_up|{_FORMER}\.up)\.weight", "up"),
        (rf"\.lora_B{_NAMED}\.bias", "up_bias"),
        (r"\.lora_mid\.weight", "mid"),
        (rf"{_FORMER}?\.alpha", "alpha"),
        (rf"\.lora_magnitude_vector{_NAMED}(?:\.weight)?", "magnitude"),
        *((rf"\.{part}", part) for part in _VERBATIM),
    )
)
"""Regular expression of a whole key, whose group is the layer's name -> what the tensor is."""


class Part(NamedTuple):
    """A tensor and the key that it has in the file."""

    key: str
    values: np.ndarray


Arrays = Mapping[str, np.ndarray]
Scale = Callable[[int | None], np.ndarray]
"""Rank, or None of whole matrices -> what a product is multiplied by."""


class Kind(NamedTuple):
    """What an adapter may do to a parameter of a layer.

    Attributes:
      leaf: the parameter, "weight" or "bias".
      parts: of which any one says that the adapter does this.
      make: all tensors of the layer -> delta.
    """

    leaf: str
    parts: tuple[str, ...]
    make: Callable[[Arrays, Scale], Delta]


def split(key: str) -> tuple[str, str] | None:
    """(a layer's name, what the tensor is) of a file's key; None for other keys."""
    for pattern, part in ENDINGS:
        if found := pattern.fullmatch(key):
            return found[1], part
    return None


def deltas(
    parts: Mapping[str, Part], layer: Layer, scale: Callable[[float, int | None], float]
) -> dict[str, Delta]:
    """The deltas of a layer's weight and bias, by the paths of our parameters.

    Args:
      parts: all of the file's tensors for this layer.
      layer: the layer.
      scale: (alpha, or 0 where the file has none, rank) -> what a product is multiplied by.

    Raises:
      ValueError: a tensor without those that belong to it, or shapes that do not fit each other or
        the layer; the message names the keys.
    """
    arrays = {name: part.values for name, part in parts.items()}
    alpha = arrays.get("alpha", np.zeros(()))
    if alpha.size != 1:
        raise ValueError(f"{parts['alpha'].key} {alpha.shape}: alpha must be one number")
    number = float(alpha.reshape(()).astype(np.float64))

    def scaled(rank: int | None) -> np.ndarray:
        return np.asarray(scale(number, rank), np.float32)

    found: dict[str, Delta] = {}
    for kind in KINDS:
        given = [parts[name] for name in kind.parts if name in parts]
        if not given:
            continue
        path, shape = layer.paths.get(kind.leaf), layer.shapes.get(kind.leaf)
        listed = ", ".join(f"{key} {values.shape}" for key, values in given)
        if path is None:
            raise ValueError(f"{listed}: {layer.peft} has no {kind.leaf}")
        if path in found:
            raise ValueError(
                f"{listed}: the {kind.leaf} of {layer.peft} is changed in another way, too"
            )
        try:
            delta = kind.make(arrays, scaled)
            fitting = fits(delta, shape)
        except KeyError as error:
            raise ValueError(f"{listed}: the layer's {error} is missing in the file") from None
        except (IndexError, ValueError, ZeroDivisionError):
            fitting = False
        if not fitting:
            raise ValueError(f"{listed} do not fit {layer.peft}, whose {kind.leaf} is {shape}")
        if len(jax.tree.leaves(delta)) - 1 != len(given):  # all but the scale
            raise ValueError(f"{listed}: {layer.peft} has factors that exclude each other")
        found[path] = delta
    if "magnitude" in parts and "dora_scale" in parts:
        raise ValueError(
            f"{parts['magnitude'].key} and {parts['dora_scale'].key} exclude each other"
        )
    for name in ("magnitude", "dora_scale"):
        if name in parts:
            path, key = layer.paths.get("weight"), parts[name].key
            if path not in found:
                raise ValueError(f"{key}: the factors that belong to it are missing in the file")
            magnitude = _magnitude(parts[name], layer.shapes["weight"], peft=name == "magnitude")
            found[path] = Decomposed(found[path], magnitude)
    return found


def fits(delta: Delta, shape: tuple[int, ...]) -> bool:
    """Whether a delta is one of a parameter of this shape, in PyTorch's layout.

    Matrices fit convolutions of 1 x 1, and of others where they are flat, (out, in kh kw).
    """
    made = _shape(delta.delta if isinstance(delta, Decomposed) else delta)
    if made is None:
        return False
    flat = (shape[0], math.prod(shape[1:]))
    return _squeezed(made) == _squeezed(shape) or (len(made) == 2 and made == flat)


def rank(delta: Delta) -> int | None:
    """Of the factors, by which alpha is divided; None of what has no such factors."""
    if isinstance(delta, LowRank):
        return delta.down.shape[0]
    if isinstance(delta, Hadamard):
        return delta.w1_b.shape[0]
    if isinstance(delta, Kronecker):
        return next((w[1].shape[0] for w in (delta.w1, delta.w2) if isinstance(w, tuple)), None)
    return rank(delta.delta) if isinstance(delta, Decomposed) else None


def _low_rank(p: Arrays, scale: Scale) -> LowRank:
    down, up = p["down"], p["up"]
    return LowRank(down, up, scale(down.shape[0]), p.get("mid"))


def _hadamard(p: Arrays, scale: Scale) -> Hadamard:
    factors = [p[name] for name in _LOHA[:4]]
    cores = [p[name] for name in _LOHA[4:]] if any(n in p for n in _LOHA[4:]) else []
    return Hadamard(*factors, scale(factors[1].shape[0]), *cores)


def _kronecker(p: Arrays, scale: Scale) -> Kronecker:
    w1 = p["lokr_w1"] if "lokr_w1" in p else (p["lokr_w1_a"], p["lokr_w1_b"])
    core = (p["lokr_t2"],) if "lokr_t2" in p else ()
    w2 = p["lokr_w2"] if "lokr_w2" in p else (p["lokr_w2_a"], p["lokr_w2_b"], *core)
    made = Kronecker(w1, w2, np.ones((), np.float32))
    return made.replace(scale=scale(rank(made)))


def _full(name: str) -> Callable[[Arrays, Scale], Full]:
    return lambda p, scale: Full(p[name], np.ones((), np.float32))


def _of_up(p: Arrays, scale: Scale) -> Full:
    """The bias that PEFT adds to B A x, before the scale."""
    return Full(p["up_bias"], scale(p["down"].shape[0]))


KINDS = (
    Kind("weight", ("down", "up", "mid"), _low_rank),
    Kind("weight", _LOHA, _hadamard),
    Kind("weight", _LOKR, _kronecker),
    Kind("weight", ("diff",), _full("diff")),
    Kind("weight", ("w_norm",), _full("w_norm")),
    Kind("bias", ("up_bias",), _of_up),
    Kind("bias", ("diff_b",), _full("diff_b")),
    Kind("bias", ("b_norm",), _full("b_norm")),
)


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without the axes of length 1 at its end, which 1 x 1 convolutions have."""
    kept = list(shape)
    while len(kept) > 1 and kept[-1] == 1:
        kept.pop()
    return tuple(kept)


def _shape(delta: Delta) -> tuple[int, ...] | None:
    """(out, in[, kh, kw]) or flat, (out, in kh kw); None where factors do not fit each other."""
    if isinstance(delta, Full):
        return delta.diff.shape
    if isinstance(delta, LowRank):
        return _matrices(delta.up, delta.down, delta.mid)
    if isinstance(delta, Hadamard):
        if delta.t1 is None:
            a, b = (delta.w1_a, delta.w2_a), (delta.w1_b, delta.w2_b)
        else:
            a, b = (delta.w1_a.T, delta.w2_a.T), (delta.w1_b, delta.w2_b)
        first, second = map(_matrices, a, b, (delta.t1, delta.t2))
        return first if first == second else None
    shapes = []
    for w in (delta.w1, delta.w2):
        if isinstance(w, tuple):
            a, b, *core = w
            shapes.append(_matrices(a.T if core else a, b, *core))
        else:
            shapes.append(w.shape)
    if None in shapes:
        return None
    (o1, i1, *ones), (o2, i2, *kernel) = shapes
    return None if math.prod(ones) != 1 else (o1 * o2, i1 * i2, *kernel)


def _matrices(
    up: np.ndarray, down: np.ndarray, core: np.ndarray | None = None
) -> tuple[int, ...] | None:
    """The shape of a product, with a core (r, r, kh, kw) between its factors or not."""
    out, (r, *rest) = up.shape[0], down.shape
    inner = (r,) if core is None else core.shape[:2]
    if not r or up.size != out * inner[0] or inner[-1] != r:
        return None
    if core is None:
        return (out, *rest)
    return None if core.ndim != 4 or math.prod(rest[1:]) != 1 else (out, rest[0], *core.shape[2:])


def _magnitude(part: Part, shape: tuple[int, ...], peft: bool) -> np.ndarray:
    """A magnitude as (out, 1[, 1, 1]) or (1, in[, 1, 1]).

    PEFT's is always over out, (out,) or (1, out, 1, 1); LyCORIS' axis of length 1 is the other.
    """
    values = part.values
    axis = int(not peft and values.ndim > 1 and values.shape[0] == 1)
    if values.size != shape[axis]:
        raise ValueError(
            f"{part.key} {values.shape}: expected {shape[axis]} magnitudes, of a weight {shape}"
        )
    return values.reshape([shape[axis] if i == axis else 1 for i in range(len(shape))])
