"""How strongly an adapter of weights acts, everywhere, in each component and in each block."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import jax

from diffusion.adapters.low_rank.deltas import Deltas
from diffusion.errors import check_range
from diffusion.pretrained.adapters import layers
from diffusion.pretrained.adapters.layers import Layer, Table

Factor = float | tuple[float, ...]
Factors = float | tuple[Factor, ...]
COMPONENTS = {"unet": "network", "network": "network"}
COMPONENTS |= {"text_encoder": "text", "text_encoder_2": "text_2"}
"""Component of a layer -> the strength that is for it."""
_BLOCK = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?(?:\.(attentions|resnets)\.(\d+))?.*")


@dataclass(frozen=True)
class Strengths:
    """How strongly an adapter acts on each layer.

    Attributes:
      strength: everywhere.
      network, text, text_2: instead of that, in the network, the text encoder, SDXL's second one.
      down, mid, up: further factors in a U-Net's blocks: a number for all of them, or a tuple with
        a number for each block, from the first that is computed, or instead of a number a tuple
        with one for each ResNet block and what follows it.
    """

    strength: float = 1.0
    network: float | None = None
    text: float | None = None
    text_2: float | None = None
    down: Factors = 1.0
    mid: float = 1.0
    up: Factors = 1.0

    def of(self, component: str) -> float:
        """In a component, without factors of blocks."""
        own = getattr(self, COMPONENTS[component])
        return self.strength if own is None else own

    def by_path(self, deltas: Deltas, table: Table) -> dict[str, float]:
        """The strength of each delta.

        Raises:
          ValueError: there are no deltas, a strength or a factor is given for what they do not
            change, or the numbers of a tuple are not as many as the blocks.
        """
        if not deltas:
            raise ValueError("nothing of the adapter is for this model")
        places = {path: layer for layer in table.layers for path in layer.paths.values()}
        changed = [places[path] for path in deltas]
        named = {COMPONENTS[layer.component] for layer in changed}
        for name in ("network", "text", "text_2"):
            if getattr(self, name) and name not in named:
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect: the adapter changes "
                    f"{', '.join(sorted(named))} alone"
                )
        for name in ("down", "mid", "up"):
            self._check(name, [layer for layer in table.layers if _block(layer, name)])
            if getattr(self, name) != 1 and not any(_block(layer, name) for layer in changed):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect: the adapter changes nothing "
                    "in these blocks"
                )
        return {
            path: self.of(layer.component) * self._factor(layer)
            for path, layer in zip(deltas, changed)
        }

    def _check(self, name: str, inside: Sequence[Layer]) -> None:
        given = getattr(self, name)
        if given == 1:
            return
        found = [_block(layer, name) for layer in inside]
        if not found:
            raise ValueError(f"{name}={given!r} has no effect: the model has no such blocks")
        if not isinstance(given, tuple):
            return
        blocks = 1 + max(int(f[2]) for f in found)
        if len(given) != blocks:
            raise ValueError(
                f"{name}={given!r} has {len(given)} entries; the model has {blocks} such blocks"
            )
        for i, own in enumerate(given):
            places = 1 + max((int(f[4]) for f in found if f[4] and int(f[2]) == i), default=0)
            if isinstance(own, tuple) and len(own) != places:
                raise ValueError(
                    f"{name}: {own!r} has {len(own)} entries; block {i} has {places} ResNet blocks"
                )

    def _factor(self, layer: Layer) -> float:
        found = _BLOCK.fullmatch(layer.name) if layer.component == layers.UNET else None
        if found is None:
            return 1.0
        own = getattr(self, found[1])
        if isinstance(own, tuple):
            own = own[int(found[2])]
        # What resamples follows the last ResNet block.
        return own[int(found[4] or -1)] if isinstance(own, tuple) else own


def _block(layer: Layer, name: str) -> re.Match | None:
    found = _BLOCK.fullmatch(layer.name) if layer.component == layers.UNET else None
    return found if found and found[1] == name else None


def strengths(
    strength: float = 1.0,
    *,
    network: float | None = None,
    text: float | None = None,
    text_2: float | None = None,
    down: Factors = 1.0,
    mid: float = 1.0,
    up: Factors = 1.0,
) -> Strengths:
    """Of the numbers in a spec.

    Raises:
      ValueError: one of them is not finite.
    """
    made = Strengths(strength, network, text, text_2, down, mid, up)
    for name, value in vars(made).items():
        for number in jax.tree.leaves(value):
            check_range(name, number)
    return made
