"""LPIPS, the perceptual distance of two images by VGG16's features (Zhang et al., 2018)."""

from __future__ import annotations

from functools import partial

import flax.linen as nn
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.kernels.convolution import three_by_three

BLOCKS = ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3))  # VGG16's widths and convolutions
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet in [0, 1]


class LPIPS(nn.Module):
    """Distances [B] of images x, y [B, H, W, 3] in [-1, 1]; H and W at least 16.

    A distance is the sum over 5 layers of the mean over pixels of
    w . (f(x) / |f(x)| - f(y) / |f(y)|)^2, where f are the last activations before each pooling and
    the weights w >= 0 were fitted to people's judgements.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Array, y: Array) -> Array:
        if x.shape != y.shape or x.shape[-1] != 3 or min(x.shape[1:3]) < 16:
            raise ValueError(
                f"images of shapes {x.shape} and {y.shape}; LPIPS compares RGB images of equal "
                "shapes, of at least 16 x 16 pixels"
            )
        h = jnp.concatenate([x, y]).astype(self.dtype)
        h = (h - (2 * jnp.array(MEAN, self.dtype) - 1)) / (2 * jnp.array(STD, self.dtype))
        conv = partial(nn.Conv, kernel_size=(3, 3), dtype=self.dtype)
        conv = partial(conv, conv_general_dilated=three_by_three)
        total, index = jnp.zeros(len(x)), 0
        for block, (width, convolutions) in enumerate(BLOCKS):
            if block > 0:
                h = nn.max_pool(h, (2, 2), (2, 2))
                index += 1
            for _ in range(convolutions):
                h = nn.relu(conv(width, name=f"features_{index}")(h))
                index += 2
            f = h.astype(jnp.float32)
            # The small number keeps the root's gradient finite where all features are 0.
            norm = jnp.sqrt((f * f).sum(-1, keepdims=True) + 1e-20) + 1e-10
            f, g = jnp.split(f / norm, 2)
            head = nn.Dense(1, use_bias=False, name=f"lin{block}")
            total = total + head((f - g) ** 2).mean((1, 2, 3))
        return total
