"""Embeddings of captions by a sentence encoder (Reimers and Gurevych, 2019)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffusion.evaluation.networks.folder import exact, opened, tokens
from diffusion.evaluation.networks.network import Network, Run
from diffusion.models.bert import sentence

LENGTH = 256  # tokens; longer captions are cut, as the published encoder does


def sentences(model: str) -> Network:
    """A sentence encoder such as all-MiniLM-L6-v2, from transformers' folder of a ``BertModel``.

    Its output "text" [B, width] is the mean of a caption's tokens, of unit norm. It sees only the
    subjects of examples. Its name has layers and width, such as "sentences_6x384".
    """
    opening, files = opened(model, "BertModel")
    net = opening.module
    encode = tokens("sentences", opening.source, min(LENGTH, net.length))

    def open_weights() -> Run:
        params = opening.load()

        @exact
        def run(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
            return sentence(net.apply({"params": params}, ids, mask), mask)

        def text(_: np.ndarray, subjects: Sequence[Any]) -> dict[str, np.ndarray]:
            ids, mask = encode(subjects)
            longest = int(mask.sum(1).max())
            longest += -longest % 32  # so that few lengths compile
            return {"text": run(params, ids[:, :longest], mask[:, :longest])}

        return text

    name = f"sentences_{net.depth}x{net.width}"
    return Network(name, open_weights, ("text",), files, pictures=False, batch=32)
