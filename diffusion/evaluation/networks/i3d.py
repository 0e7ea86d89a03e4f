"""I3D's logits of clips, in which FVD is taken (Unterthiner et al., 2018)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from diffusion.evaluation import resize as resizers
from diffusion.evaluation.networks.network import Network, Run, existing
from diffusion.levels import Array
from diffusion.models.i3d import FEWEST, I3D
from diffusion.pretrained.networks import i3d as weights_of
from diffusion.specs import unknown

SIDE = 224  # pixels
RESIZES = {
    "torch": (resizers.torch_bilinear, "torch bilinear to 224 x 224"),
    "tf": (resizers.tf_bilinear, "TF-1 bilinear to 224 x 224"),
}


@jax.jit
def _logits(params: Any, x: Array) -> Array:
    return I3D().apply({"params": params}, x / 127.5 - 1)


def i3d(weights: str, resize: str = "torch") -> Network:
    """I3D for Kinetics-400; "features" [B, 400] of clips are its logits, means over time.

    Clips have 9 frames at least, which are rounded to uint8. FVD is
    ``frechet(i3d("FILE.safetensors"))``; it depends on the number of frames and their rate, so
    compare only figures of equal clips.

    Args:
      weights: a file as ``diffusion.pretrained.networks.i3d.load`` reads it.
      resize: "torch" as evaluators in PyTorch; "tf" as TensorFlow 1, in which FVD was published,
        and which is in the network's name, because figures of the two differ.
    """
    if resize not in RESIZES:
        raise unknown("i3d(resize)", resize, RESIZES)
    path, (resized, about) = existing("i3d", weights), RESIZES[resize]
    name = "i3d" if resize == "torch" else f"i3d_{resize}"

    def open_weights() -> Run:
        params = weights_of.load(path)

        def run(x: np.ndarray, _: Sequence[Any]) -> dict[str, Any]:
            if x.shape[1] < FEWEST:
                raise ValueError(
                    f"{name} takes clips of {FEWEST} frames or more, got {x.shape[1]}: {x.shape}"
                )
            frames = resized(x.reshape(-1, *x.shape[2:]), SIDE)
            return {"features": _logits(params, frames.reshape(*x.shape[:2], SIDE, SIDE, 3))}

        return run

    about = f"{about}, x / 127.5 - 1"
    return Network(name, open_weights, files=(path,), preparation=about, clips=True, batch=4)
