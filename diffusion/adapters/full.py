"""Training of a network's own parameters, all or some, as an adapter."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion.adapters.adapter import Params
from diffusion.levels import Array


@dataclass(frozen=True)
class Full:
    """New values for the parameters whose paths match ``what``; the others stay.

    Attributes:
      what: regular expression, searched for in paths such as "text/encoder/layers_0/fc1/kernel".
    """

    what: str = ""

    def network(self, network: nn.Module) -> nn.Module:
        """The same."""
        return network

    def init(self, key: Array, base: Params) -> Params:
        """{path: value}, in float32.

        Raises:
          ValueError: no parameter's path matches.
        """
        del key
        flat = flatten_dict(base, sep="/")
        chosen = {path: value for path, value in flat.items() if re.search(self.what, path)}
        if not chosen:
            raise ValueError(
                f"full({self.what!r}): no parameter has such a path; some are "
                f"{', '.join(list(flat)[:4])}"
            )
        return {path: value.astype(jnp.float32) for path, value in chosen.items()}

    def merge(self, base: Params, params: Params) -> Params:
        """The base's parameters with the new values."""
        flat: dict[str, Any] = flatten_dict(base, sep="/")
        return unflatten_dict({**flat, **params}, sep="/")


def full(what: str = "") -> Full:
    """Trains the network's own parameters; see ``Full``.

    Raises:
      ValueError: ``what`` is no regular expression.
    """
    try:
        re.compile(what)
    except re.error as error:
        raise ValueError(f"full({what!r}) is no regular expression: {error}") from None
    return Full(what)
