"""FID's Inception-v3 in its three preparations, and the one of nsfwjs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from diffusion.evaluation import resize as resizers
from diffusion.evaluation.networks.network import Network, Run, existing
from diffusion.levels import Array
from diffusion.models.inception import Inception
from diffusion.pretrained.networks import inception as files
from diffusion.specs import unknown

SIDE = 299  # pixels
OUTPUTS = ("features", "spatial", "logits")


def _signed(x: Array) -> Array:
    return (x - 128) / 128


def _doubled(x: Array) -> Array:
    return 2 * (x / 255) - 1


RESIZES = {
    "tf": (resizers.tf_bilinear, _signed, "TF-1 bilinear to 299 x 299, (x - 128) / 128"),
    "clean": (resizers.pil_bicubic, _signed, "PIL bicubic to 299 x 299, (x - 128) / 128"),
    "torch": (resizers.torch_bilinear, _doubled, "torch bilinear to 299 x 299, 2 x / 255 - 1"),
}
"""Name -> (resizing, scaling, what a report says of both)."""


def inception(weights: str, resize: str = "tf") -> Network:
    """Inception-v3 by the graph of 2015-12-05, in which FID, sFID, IS and KID are defined.

    Outputs are "features" [B, 2048], "spatial" [B, 2023] (sFID) and "logits" [B, 1008] without
    their bias (IS).

    Args:
      weights: a file as ``diffusion.pretrained.networks.inception.load`` reads it.
      resize: "tf" as ADM, EDM2, torch-fidelity and NVIDIA's networks; "clean" as clean-fid's;
        "torch" as pytorch-fid. The last two are in the network's name: their figures differ.
    """
    if resize not in RESIZES:
        raise unknown("resize", resize, RESIZES)
    *prepare, about = RESIZES[resize]
    name = "inception2015" if resize == "tf" else f"inception2015_{resize}"
    path = existing("inception", weights)
    return _network(name, Inception(), path, *prepare, about, OUTPUTS)


def nsfwjs(weights: str) -> Network:
    """The Inception-v3 of nsfwjs 4.4.0, fine-tuned to other classes: not FID's.

    Its output is "features" [B, 2048].

    Args:
      weights: what ``diffusion.pretrained.networks.inception.convert_nsfwjs`` writes.
    """
    path = existing("nsfwjs", weights)
    net = Inception(classes=0, last_pool="mean")
    about = "torch bilinear to 299 x 299, x / 255"
    resize, scale = resizers.torch_bilinear, lambda x: x / 255
    return _network("nsfwjs", net, path, resize, scale, about, OUTPUTS[:1])


def _network(
    name: str,
    net: Inception,
    path: Path,
    resize: Callable[[np.ndarray, int], Array],
    scale: Callable[[Array], Array],
    about: str,
    outputs: tuple[str, ...],
) -> Network:
    forward = jax.jit(lambda params, x: net.apply({"params": params}, scale(x)))

    def open_weights() -> Run:
        params = files.load(path, net)

        def run(x: np.ndarray, _: Sequence[Any]) -> dict[str, Any]:
            given = forward(params, resize(x, SIDE))
            return {output: getattr(given, output) for output in outputs}

        return run

    return Network(name, open_weights, outputs, (path,), about, batch=32)
