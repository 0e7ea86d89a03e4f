"""The contract of adapters that are trained: a frozen model, and a few parameters beside it."""

from __future__ import annotations

from typing import Any, Protocol

import flax.linen as nn

from diffusion.levels import Array

Params = Any


class Adapter(Protocol):
    """What is trained beside a network that stays as it is.

    An adapter is made for one network, whose parameters ``base`` are nested dicts. One that makes a
    network edit pictures, which it takes as ``cond.image``, has the member ``edits``, True. One
    that leaves out some of its parameters at random has ``dropped(params, key) -> params``, which a
    training step sees.
    """

    def network(self, network: nn.Module) -> nn.Module:
        """The network that is trained and drawn from: the same, or one around it."""

    def init(self, key: Array, base: Params) -> Params:
        """The adapter's initial parameters, with which the network computes what it did before.

        Traceable; of ``base`` often only shapes matter.
        """

    def merge(self, base: Params, params: Params) -> Params:
        """The parameters of ``network(...)``, of the frozen ones and the adapter's. Traceable."""
