"""Training of LoRA and its relatives: a few factors beside weights that stay as they are.

The factors are merged into the weights in every step,

    W' = W + alpha / r B A                                    (Hu et al., 2022)
    W' = m (W + alpha / r B A) / ||W + alpha / r B A||        (DoRA; Liu et al., 2024)

so that any network can have them and knows nothing of it, and so that a step costs what one of the
network costs, whatever the rank.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion.adapters.adapter import Params
from diffusion.adapters.low_rank import kinds
from diffusion.adapters.low_rank.deltas import Decomposed, Delta, Deltas
from diffusion.adapters.low_rank.kinds import KINDS
from diffusion.adapters.low_rank.merge import changed, torch_shape
from diffusion.adapters.low_rank.products import float32
from diffusion.adapters.low_rank.targets import by_pattern, choose, layers
from diffusion.errors import check_range
from diffusion.levels import Array
from diffusion.specs import unknown

KERNEL = "{}/kernel"


@dataclass(frozen=True, eq=False)
class Lora:
    """A trained adapter of weights, whose parameters are {path: {factor: array}}, in float32.

    Factors are named and shaped as ``deltas`` says. Those of DoRA have "magnitude" (out, 1[, 1, 1])
    beside them. Layers whose parameters are stacked, as kernels [L, in, out], have stacked factors.

    Attributes:
      ranks: preset or regular expression of layers' paths -> r; the first that matches counts.
      alphas: likewise -> alpha, which is r where nothing matches.
      kind: "lora", "loha" or "lokr".
      dora: whether the norms of weights are trained.
      rank_stabilised: whether B A is multiplied by alpha / sqrt(r) instead of alpha / r
        (Kalajdzievski, 2023).
      dropout: the share of A's rows that a training step leaves out, the same ones for all of its
        examples; the others are enlarged accordingly. It takes the place of dropout in the layer's
        input, which merged weights do not have.
      normal: whether A begins with deviation 1 / r, not uniform in +-1 / sqrt(fan in).
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    kind: str = "lora"
    dora: bool = False
    rank_stabilised: bool = False
    dropout: float = 0.0
    normal: bool = False

    def network(self, network: nn.Module) -> nn.Module:
        """The same."""
        return network

    def init(self, key: Array, base: Params) -> Params:
        """Factors with which every weight stays what it is, to the bit.

        Raises:
          ValueError: a pattern matches no layer.
        """
        found = layers(base)
        ranks = choose(found, self.ranks)
        self._scales(ranks)
        begins = {layer: self._begins(found[layer].shape, rank) for layer, rank in ranks.items()}
        made = kinds.init(key, begins)
        if self.dora:
            for layer, own in made.items():
                own["magnitude"] = _norms(found[layer])
        return {KERNEL.format(layer): own for layer, own in made.items()}

    def deltas(self, params: Params) -> Deltas:
        """What the parameters add to the weights, by path within the network.

        The matrices of stacked layers have paths of their own, "blocks/attn/qkv/kernel/0".
        """
        made: dict[str, Delta] = {}
        for path, delta in self._deltas(params).items():
            if not _stacked(params[path]):
                made[path] = delta
                continue
            for i in range(next(len(a) for a in jax.tree.leaves(delta) if a.ndim)):
                made[f"{path}/{i}"] = jax.tree.map(lambda a, i=i: a[i] if a.ndim else a, delta)
        return made

    def _deltas(self, params: Params) -> Deltas:
        """Likewise, with stacks of factors for stacked layers."""
        scales = self._scales([_layer(path) for path in params])
        made = {}
        for path, own in params.items():
            delta = KINDS[self.kind].delta(own, scales[_layer(path)])
            made[path] = Decomposed(delta, own["magnitude"]) if self.dora else delta
        return made

    def merge(self, base: Params, params: Params) -> Params:
        """The base's parameters with the adapter in them; those that it changes are float32.

        Raises:
          ValueError: the adapter is for another network; the message names the parameter.
        """
        flat: dict[str, Any] = flatten_dict(base, sep="/", keep_empty_nodes=True)
        for path, delta in self._deltas(params).items():
            if path not in flat:
                near = ", ".join(get_close_matches(path, flat, 1)) or "none"
                raise ValueError(f"the network has no parameter {path}; nearest: {near}")
            try:
                flat[path] = _merged(float32(flat[path]), delta)
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
        return unflatten_dict(flat, sep="/")

    def dropped(self, params: Params, key: Array) -> Params:
        """The parameters as a training step sees them, without the rows that dropout takes."""
        if not self.dropout:
            return params
        return {path: self._dropped(path, own, key) for path, own in params.items()}

    def _begins(self, shape: tuple[int, ...], rank: int) -> dict[str, kinds.Begin]:
        stack = shape[:1] if len(shape) == 3 else ()
        begins = KINDS[self.kind].begin(torch_shape(shape[len(stack) :]), rank, self.normal)
        return {name: b._replace(shape=stack + b.shape) for name, b in begins.items()}

    def _scales(self, chosen: Any) -> dict[str, Array]:
        """Layer -> alpha / r or alpha / sqrt(r)."""
        ranks = choose(chosen, self.ranks)
        alphas = choose(chosen, self.alphas, "alpha") if self.alphas else {}
        return {
            layer: float32(alphas.get(layer, rank) / rank ** (0.5 if self.rank_stabilised else 1))
            for layer, rank in ranks.items()
        }

    def _dropped(self, path: str, own: Params, key: Array) -> Params:
        down = own["down"]
        key = jax.random.fold_in(key, zlib.crc32(path.encode()) >> 1)
        kept = down.shape[:2] if _stacked(own) else down.shape[:1]
        kept = jax.random.bernoulli(key, 1 - self.dropout, kept) / (1 - self.dropout)
        return {**own, "down": down * kept.reshape(*kept.shape, *(1,) * (down.ndim - kept.ndim))}


def _merged(w: Array, delta: Delta) -> Array:
    if w.ndim != 3:
        return changed(w, [(delta, jnp.ones(()))], kernel=True)
    delta = jax.tree.map(lambda a: a if a.ndim else jnp.full(len(w), a), delta)
    return jax.vmap(partial(changed, kernel=True))(w, [(delta, jnp.ones(len(w)))])


def _norms(w: Array) -> Array:
    """||W|| as (out, 1[, 1, 1]), or of stacked layers as (L, out, 1)."""
    axes = (1,) if w.ndim == 3 else tuple(range(w.ndim - 1))
    norms = jnp.sqrt(jnp.sum(float32(w) ** 2, axis=axes))
    return norms[..., None] if w.ndim == 3 else norms.reshape(-1, *(1,) * (w.ndim - 1))


def _stacked(own: Mapping[str, Array]) -> bool:
    """Whether factors are those of stacked layers: matrices are (L, ...) then, and (...) else."""
    return next(own[name] for name in ("up", "w1", "w1_a") if name in own).ndim == 3


def _layer(path: str) -> str:
    return path.rpartition("/")[0]


def lora(
    rank: int = 4,
    alpha: float | Mapping[str, float] | None = None,
    targets: str | Mapping[str, int] = "attention",
    *,
    kind: str = "lora",
    dora: bool = False,
    rank_stabilised: bool = False,
    dropout: float = 0.0,
    normal: bool = False,
) -> Lora:
    """An adapter of weights.

    Args:
      rank: of layers to which ``targets`` gives none of their own.
      alpha: of all layers, or by pattern; by default the rank.
      targets: a preset (``targets.PRESETS``) or a regular expression over layers' paths, or ranks
        by these: {"attention": 16, "text_attention": 4}.
      kind: "lora", "loha" (Hyeon-Woo et al., 2022) or "lokr" (Yeh et al., 2024).
      dora, rank_stabilised, dropout, normal: see ``Lora``.

    Raises:
      ValueError: a number is out of range, or options do not go together.
    """
    ranks = by_pattern("targets", targets if isinstance(targets, Mapping) else {targets: rank}, 1)
    if any(not isinstance(r, int) for r in ranks.values()):
        raise ValueError(f"ranks must be whole numbers, got {list(ranks.values())}")
    given = {"": alpha} if isinstance(alpha, int | float) else alpha
    alphas = {} if given is None else by_pattern("alpha", given, 0)
    if any(number == 0 for number in alphas.values()):
        raise ValueError("alpha=0 would leave every weight as it is")
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)
    check_range("dropout", dropout, 0, 0.99)
    for name, value in (("dropout", dropout), ("normal", normal)):
        if value and kind != "lora":
            raise ValueError(f"{name}={value} is of kind='lora' alone, not of {kind!r}")
    return Lora(ranks, alphas, kind, dora, rank_stabilised, dropout, normal)
