"""LeNet-5 for MNIST, from a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data.sources import read_npz
from diffusion.evaluation.networks.network import Network, Run, existing

_KERNELS = {"convnet.c1": (6, 1, 5, 5), "convnet.c3": (16, 6, 5, 5), "convnet.c5": (120, 16, 5, 5)}
_KERNELS |= {"fc.f6": (84, 120), "fc.f7": (10, 84)}
SHAPES = {f"{name}.weight": shape for name, shape in _KERNELS.items()}
SHAPES |= {f"{name}.bias": shape[:1] for name, shape in _KERNELS.items()}


def lenet5(weights: str) -> Network:
    """LeNet-5 (LeCun et al., 1998) for MNIST from an ``.npz``.

    Its outputs are "features" [B, 84], those before the last layer, and "label" [B] int. Layers:
    convolutions 6, 16, 120 (5 x 5, ReLU, 2 x 2 max-pooling after the first two), dense 84 and 10,
    input 32 x 32 in [0, 1], enlarged bilinearly from 28 x 28. Takes [B, 28, 28, 1] in [-1, 1], or
    [B, 32, 32, 1], whose border of two pixels is cut off. The file has ``convnet.{c1,c3,c5}`` and
    ``fc.{f6,f7}``, each with ``.weight`` and ``.bias`` in PyTorch's layouts.
    """
    path = existing("lenet5", weights)

    def open_weights() -> Run:
        stored = read_npz(path)
        shapes = {name: stored[name].shape for name in SHAPES if name in stored}
        wrong = [name for name, shape in SHAPES.items() if shapes.get(name) != shape]
        if wrong:
            raise ValueError(
                f"{path} is not LeNet-5's: {wrong[0]} should be {SHAPES[wrong[0]]}, got "
                f"{shapes.get(wrong[0], 'nothing')}"
            )
        stored = {name: jnp.asarray(stored[name], jnp.float32) for name in SHAPES}

        def run(x: np.ndarray, _: Sequence[Any]) -> dict[str, Any]:
            if x.shape[1:] not in ((28, 28, 1), (32, 32, 1)):
                raise ValueError(f"LeNet-5 takes [N, 28, 28, 1] or [N, 32, 32, 1], got {x.shape}")
            logits, features = _lenet5(stored, x)
            return {"features": features, "label": np.asarray(logits).argmax(-1)}

        return run

    about = "bilinear to 32 x 32, not rounded"
    outputs = ("features", "label")
    return Network("lenet5", open_weights, outputs, (path,), about, pictures=False, batch=500)


@jax.jit
def _lenet5(weights: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [N, 10] and features [N, 84]."""

    def conv(x: jax.Array, name: str) -> jax.Array:
        kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)  # OIHW -> HWIO
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)
        return jax.nn.relu(x + weights[f"{name}.bias"][None, None, None])

    def pool(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def dense(x: jax.Array, name: str) -> jax.Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"][None]

    x = (x[:, 2:30, 2:30] if x.shape[1] == 32 else x) / 2 + 0.5
    x = jax.image.resize(x, (len(x), 32, 32, 1), "bilinear")
    x = pool(conv(x, "convnet.c1"))  # [N, 14, 14, 6]
    x = pool(conv(x, "convnet.c3"))  # [N, 5, 5, 16]
    x = conv(x, "convnet.c5").reshape(len(x), 120)
    features = jax.nn.relu(dense(x, "fc.f6"))
    return dense(features, "fc.f7"), features
