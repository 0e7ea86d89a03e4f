"""Adapters of fewer numbers: smaller ranks, the difference of two models, several as one.

Everything rests on the singular value decomposition, whose first r values give the best change of
rank r (Eckart and Young, 1936). It is computed on the host, in float64.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from diffusion.adapters.low_rank.deltas import Decomposed, Delta, Deltas, Full, LowRank
from diffusion.adapters.low_rank.merge import (
    Params,
    flat_params,
    is_kernel,
    matrices,
    whole,
)
from diffusion.adapters.low_rank.products import factors, matrix
from diffusion.adapters.low_rank.targets import check
from diffusion.errors import check_range
from diffusion.specs import unknown


def resize(deltas: Deltas, rank: int | None = None, energy: float | None = None) -> Deltas:
    """The nearest adapter of this rank, or of the smallest that keeps a share of ||dW||^2.

    Of DoRA the change within the norm is resized. What has no singular values, changes of biases
    and of norms' scales, stays.

    Args:
      rank: at most, of every layer.
      energy: share in (0, 1] of the sum of squared singular values that is kept, layer by layer.

    Raises:
      ValueError: neither is given, or one is out of range.
    """
    _check(rank, energy)
    return {path: _resized(delta, rank, energy) for path, delta in deltas.items()}


def extract(
    tuned: Params,
    base: Params,
    rank: int | None = None,
    energy: float | None = None,
    targets: str = "",
    *,
    others: bool = False,
) -> Deltas:
    """The adapter that makes ``tuned`` of ``base``, two models' parameters; see ``resize``.

    Args:
      tuned, base: pipelines', {"network": ..., "encoders": [...]}, of the same structure.
      rank, energy: of each layer's difference, as in ``resize``.
      targets: preset or regular expression of layers' paths, without the component.
      others: whether changes of biases and of norms' scales in these layers are taken along, whole.

    Raises:
      ValueError: the models differ in structure or nowhere in the targets.
    """
    _check(rank, energy)
    new, old = (_matrices(flat_params(params)) for params in (tuned, base))
    for path in sorted(new.keys() ^ old.keys()):
        raise ValueError(f"one of the models has a parameter {path}, the other one has not")
    expression, found = re.compile(check(targets)), {}
    for path, w in old.items():
        layer = whole(path).rpartition("/")[0]
        inside = layer.removeprefix("network/")
        inside = re.sub(r"^encoders/", "text/encoders_", inside)
        if not getattr(w, "size", 0) or not expression.search(inside):
            continue
        if w.shape != new[path].shape:
            raise ValueError(f"{path} is {new[path].shape} in one model, {w.shape} in the other")
        kernel = is_kernel(path)
        change = _float64(new[path]) - _float64(w)
        if not change.any() or not (kernel or others):
            continue
        difference = _full(np.moveaxis(change, (-1, -2), (0, 1)) if kernel else change)
        found[path] = _resized(difference, rank, energy) if kernel else difference
    if not found:
        raise ValueError(f"the models do not differ in the layers of targets={targets!r}")
    return found


def combine(
    adapters: Sequence[tuple[Deltas, float]], how: str = "cat", rank: int | None = None
) -> Deltas:
    """One adapter of several, each with a weight: dW = sum_i w_i dW_i, or nearly so.

    Args:
      adapters: deltas and their weights.
      how: "cat" puts the factors side by side, which is exact; layers that have other deltas than
        products of two factors become whole differences. "svd" gives the best sum of this rank, by
        default the largest that a layer has. "linear" adds the factors, each times the square root
        of its weight: the rank is that of one, but A_i B_j of different adapters come along.
      rank: for "svd".

    Raises:
      ValueError: there is no such ``how``, ranks differ for "linear", or a layer has DoRA, which
        adds nothing that does not depend on the weight: merge it, and extract the difference.
    """
    ways = {"cat": _cat, "svd": _svd_sum, "linear": _linear}
    if how not in ways:
        raise unknown("how", how, ways)
    if rank is not None:
        if how != "svd":
            raise ValueError(f"rank={rank} is for how='svd', not for {how!r}")
        _check(rank, None)
    layers: dict[str, list[tuple[Delta, float]]] = {}
    for deltas, weight in adapters:
        check_range("weight", weight)
        for path, delta in deltas.items():
            layers.setdefault(path, []).append((delta, weight))
    made = {}
    for path, own in layers.items():
        if any(isinstance(delta, Decomposed) for delta, _ in own):
            raise ValueError(
                f"{path} has DoRA, whose changes cannot be added: merge the adapters into the "
                "model and extract the difference"
            )
        try:
            made[path] = ways[how](own, rank)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return made


def _matrices(flat: dict[str, Any]) -> dict[str, Any]:
    """Parameters by path, all stacks taken apart."""
    stacks = [path for path, w in flat.items() if is_kernel(path) and w.ndim == 3]
    return matrices(flat, [f"{path}/0" for path in stacks])


def _resized(delta: Delta, rank: int | None, energy: float | None) -> Delta:
    if isinstance(delta, Decomposed):
        return replace(delta, delta=_resized(delta.delta, rank, energy))
    if isinstance(delta, Full) and delta.diff.ndim == 1:
        return delta
    return _truncated(_decomposition([(delta, 1.0)]), _kernel(delta), rank, energy)


def _kernel(delta: Delta) -> tuple[int, ...]:
    """A's axes after the first: (in, kh, kw) where the delta's arrays tell, else (in kh kw,)."""
    if isinstance(delta, LowRank) and delta.mid is not None:
        return (delta.down.shape[1], *delta.mid.shape[2:])
    if isinstance(delta, LowRank | Full):
        return (delta.down if isinstance(delta, LowRank) else delta.diff).shape[1:]
    return (matrix(delta).shape[1],)


Decomposition = tuple[np.ndarray, np.ndarray, np.ndarray]
"""U (out, k), singular values (k,), V^T (k, in kh kw)."""


def _decomposition(terms: Sequence[tuple[Delta, float]]) -> Decomposition:
    """Of the sum of deltas, each times its weight."""
    if not all(isinstance(delta, LowRank) for delta, _ in terms):
        return _svd(sum(weight * _float64(matrix(delta)) for delta, weight in terms))
    up, down = _side_by_side(terms)
    if up.shape[1] >= min(len(up), down.shape[1]):
        return _svd(up @ down)
    (q, r), (p, s) = np.linalg.qr(up), np.linalg.qr(down.T)
    u, values, v = _svd(r @ s.T)
    return q @ u, values, v @ p.T


def _svd(a: np.ndarray) -> Decomposition:
    return np.linalg.svd(a, full_matrices=False)


def _side_by_side(terms: Sequence[tuple[Delta, float]]) -> tuple[np.ndarray, np.ndarray]:
    """(out, all r), (all r, in kh kw), with the scales and weights in the first."""
    ups, downs = [], []
    for delta, weight in terms:
        up, down = map(_float64, factors(delta))
        ups.append(weight * up)
        downs.append(down)
    return np.concatenate(ups, axis=1), np.concatenate(downs)


def _truncated(
    decomposition: Decomposition,
    kernel: tuple[int, ...],
    rank: int | None,
    energy: float | None,
) -> LowRank:
    u, values, v = decomposition
    kept = len(values) if rank is None else min(rank, len(values))
    if energy is not None:
        shares = np.cumsum(values**2)
        kept = min(kept, 1 + int(np.searchsorted(shares, energy * shares[-1])))
    root = np.sqrt(values[:kept])
    return _low_rank(u[:, :kept] * root, root[:, None] * v[:kept], kernel)


def _low_rank(up: np.ndarray, down: np.ndarray, kernel: tuple[int, ...]) -> LowRank:
    """With alpha = r."""
    rank = len(down)
    up = up.reshape(len(up), rank, *(1,) * (len(kernel) - 1))
    down = down.reshape(rank, *kernel)
    return LowRank(down.astype(np.float32), up.astype(np.float32), np.ones((), np.float32))


def _full(diff: np.ndarray) -> Full:
    return Full(diff.astype(np.float32), np.ones((), np.float32))


def _cat(terms: Sequence[tuple[Delta, float]], rank: None) -> Delta:
    if all(isinstance(delta, LowRank) for delta, _ in terms):
        return _low_rank(*_side_by_side(terms), _kernel(terms[0][0]))
    total = sum(weight * _float64(matrix(delta)) for delta, weight in terms)
    shapes = [delta.diff.shape for delta, _ in terms if isinstance(delta, Full)]
    return _full(total.reshape(shapes[0] if shapes else total.shape))


def _svd_sum(terms: Sequence[tuple[Delta, float]], rank: int | None) -> Delta:
    if all(isinstance(delta, Full) and delta.diff.ndim == 1 for delta, _ in terms):
        return _cat(terms, None)
    ranks = [len(delta.down) for delta, _ in terms if isinstance(delta, LowRank)]
    rank = rank or (max(ranks) if len(ranks) == len(terms) else None)
    return _truncated(_decomposition(terms), _kernel(terms[0][0]), rank, None)


def _linear(terms: Sequence[tuple[Delta, float]], rank: None) -> Delta:
    if all(isinstance(delta, Full) for delta, _ in terms):
        return _cat(terms, None)
    if not all(isinstance(delta, LowRank) for delta, _ in terms):
        raise ValueError("how='linear' adds factors A and B, which not all of the adapters have")
    up, down, ranks = 0.0, 0.0, {delta.down.shape[0] for delta, _ in terms}
    if len(ranks) > 1:
        raise ValueError(f"how='linear' needs equal ranks, got {sorted(ranks)}")
    for delta, weight in terms:
        b, a = map(_float64, factors(replace(delta, scale=1.0)))
        scale = weight * float(delta.scale)
        up += np.sqrt(abs(scale)) * b
        down += np.sign(scale) * np.sqrt(abs(scale)) * a
    return _low_rank(up, down, _kernel(terms[0][0]))


def _float64(a: Any) -> np.ndarray:
    return np.asarray(a, np.float64)


def _check(rank: int | None, energy: float | None) -> None:
    if rank is None and energy is None:
        raise ValueError("give rank=, energy= or both")
    if rank is not None:
        check_range("rank", rank, 1)
    if energy is not None:
        check_range("energy", energy, 0, 1, above=True)
