"""VGGish, a network of log-mel spectrograms (Hershey et al., 2017)."""

from __future__ import annotations

from functools import partial

import flax.linen as nn

from diffusion.levels import Array
from diffusion.models.inception import EXACT

BLOCKS = ((64, 1), (128, 1), (256, 2), (512, 2))  # widths and convolutions
HIDDEN, FEATURES = 4096, 128
PATCH = (96, 64)  # frames and mel bands


class VGGish(nn.Module):
    """(patches [B, 96, 64] of log-mel spectrograms) -> [B, 128], before any activation or PCA.

    Modules are numbered as PyTorch's port has them.
    """

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x, index = x[..., None], 0
        conv = partial(nn.Conv, kernel_size=(3, 3), precision=EXACT)
        for width, convolutions in BLOCKS:
            for _ in range(convolutions):
                x = nn.relu(conv(width, name=f"features_{index}")(x))
                index += 2
            x = nn.max_pool(x, (2, 2), (2, 2))
            index += 1
        x = x.reshape(len(x), -1)
        dense = partial(nn.Dense, precision=EXACT)
        for index in (0, 2):
            x = nn.relu(dense(HIDDEN, name=f"embeddings_{index}")(x))
        return dense(FEATURES, name="embeddings_4")(x)
