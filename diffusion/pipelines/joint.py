"""A pipeline's network with its text encoders inside, as an adapter is trained in it.

A run with a text encoder of its own has it inside already. Published pipelines keep encoders apart;
inside, they can be trained, or trained through.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import numpy as np

from diffusion.models.text_encoders import TextEncoders
from diffusion.models.text_to_image import TextToImage
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pipelines.prompts import Prompts

ENCODER = "encoders_{}"


def encoders(pipeline: Pipeline) -> Prompts | None:
    """The conditioner that holds text encoders, if there is one."""
    return pipeline.conditioner if hasattr(pipeline.conditioner, "encoders") else None


def network(pipeline: Pipeline) -> nn.Module:
    """The network, which reads ``cond.tokens`` if the pipeline has text encoders."""
    prompts = encoders(pipeline)
    if prompts is None:
        return pipeline.network
    text = TextEncoders(tuple(prompts.encoders), prompts.sdxl)
    return TextToImage(text=text, image=pipeline.network)


def params(pipeline: Pipeline, separate: Params) -> Any:
    """The parameters of ``network``, of the pipeline's."""
    if encoders(pipeline) is None:
        return separate["network"]
    text = {ENCODER.format(i): tree for i, tree in enumerate(separate["encoders"])}
    return {"text": text, "image": separate["network"]}


def parted(joint: Any, has_encoders: bool) -> dict[str, Any]:
    """The pipeline's parameters of network and text encoders, of the joint network's."""
    if not has_encoders:
        return {"network": joint}
    text = joint["text"]
    return {
        "network": joint["image"],
        "encoders": [text[ENCODER.format(i)] for i in range(len(text))],
    }


def path(inside: str, has_encoders: bool) -> str:
    """The path of a parameter in the pipeline's, "encoders/0/...", of its one in the joint
    network's, "text/encoders_0/..."."""
    if not has_encoders:
        return f"network/{inside}"
    own = re.sub(r"^image/", "network/", inside)
    return re.sub(r"^text/encoders_(\d+)/", r"encoders/\1/", own)


def image_part(network: nn.Module, has_encoders: bool) -> nn.Module:
    """The pipeline's network, of the joint one."""
    return network.image if has_encoders else network


def encode(prompts: Prompts, captions: Sequence[str]) -> dict[str, np.ndarray]:
    """Captions -> ``tokens`` [N, E, L] int32, as each encoder's tokenizer numbers them.

    Longer ones are cut, shorter ones padded; like Stable Diffusion's, a network attends to the
    padding too.
    """
    return {"tokens": np.stack([prompts.ids(caption) for caption in captions])}
