"""Inception-v3 (Szegedy et al., 2016), whose features are those of FID and its relatives.

Modules have the names that PyTorch's ports of the network share: ``Mixed_6d/branch1x1/conv``.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn.initializers import he_normal, normal, ones, zeros

from diffusion.levels import Array
from diffusion.models.kernels.convolution import fewer_products, three_by_three

EPS = 1e-3  # of all batch norms
SPATIAL = 7  # channels of the spatial features, as sFID takes them (Nash et al., 2021)
LAYOUT = ("NHWC", "HWIO", "NHWC")
EXACT = lax.Precision.HIGHEST  # features differ visibly with fewer digits


class Layer(NamedTuple):
    """A convolution with its batch norm and ReLU."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"


Chain = tuple[Layer | tuple[Layer, ...], ...]
"""Layers one after the other; those in a tuple of their own all take what the one before gives."""


class Outputs(NamedTuple):
    """What the network gives of B images.

    Attributes:
      features: [B, 2048], means over the pixels of the last block ("pool3").
      spatial: [B, 2023], 7 channels of 17 x 17 pixels, in the order rows, columns, channels.
      logits: [B, classes] without their bias, as the inception score takes them; None without
        classes.
    """

    features: Array
    spatial: Array
    logits: Array | None


class _Conv(nn.Module):
    """The kernel of a convolution."""

    layer: Layer

    @nn.compact
    def __call__(self, channels: int) -> Array:
        return self.param(
            "kernel", he_normal(), (*self.layer.kernel, channels, self.layer.features)
        )


class FixedNorm(nn.Module):
    """(factor, offset), each [C]: what a batch norm with fixed statistics does to a channel."""

    features: int

    @nn.compact
    def __call__(self) -> tuple[Array, Array]:
        shape = (self.features,)
        scale, bias = self.param("scale", ones, shape), self.param("bias", zeros, shape)
        mean, var = self.param("running_mean", zeros, shape), self.param("running_var", ones, shape)
        factor = scale * lax.rsqrt(var + EPS)
        return factor, bias - mean * factor


class Unit(nn.Module):
    """A ``Layer`` of x [B, H, W, C], in two halves between which others may act."""

    layer: Layer

    def setup(self) -> None:
        self.conv, self.bn = _Conv(self.layer), FixedNorm(self.layer.features)

    def kernel(self, channels: int) -> Array:
        """The convolution's kernel [h, w, channels, features]."""
        return self.conv(channels)

    def finish(self, x: Array) -> Array:
        """Batch norm and ReLU of the convolved x."""
        factor, offset = self.bn()
        return nn.relu(x * factor + offset)

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel(x.shape[-1])
        return self.finish(convolve(x, kernel, self.layer.stride, self.layer.padding))


def convolve(x: Array, kernel: Array, stride: int = 1, padding: str = "SAME") -> Array:
    """The convolution of x [B, H, W, C] with a kernel [h, w, C, O]."""
    if kernel.shape[:2] == (1, 1):
        return jnp.matmul(x, kernel[0, 0], precision=EXACT)
    if kernel.shape[:2] == (3, 3) and stride == 1 and padding == "VALID" and fewer_products():
        # The fast forms pad: the border that they add costs less than they save.
        return convolve(x, kernel)[:, 1:-1, 1:-1]
    strides = (stride, stride)
    return three_by_three(x, kernel, strides, padding, dimension_numbers=LAYOUT, precision=EXACT)


def max_pool(x: Array, stride: int = 1) -> Array:
    """Maxima of 3 x 3 neighbours, of a padded x if the stride is 1.

    Maxima of shifted images take a fraction of the time of XLA's windows on a CPU.
    """
    if stride == 1:
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-jnp.inf)
    ends = [n - 3 + 1 for n in x.shape[1:3]]
    x = reduce(jnp.maximum, [x[:, i : i + ends[0] : stride] for i in range(3)])
    return reduce(jnp.maximum, [x[:, :, i : i + ends[1] : stride] for i in range(3)])


def mean_pool(x: Array) -> Array:
    """Means of 3 x 3 neighbours, of which those outside of the image do not count."""
    h, w = x.shape[1:3]
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    x = sum(x[:, i : i + h] for i in range(3))
    x = sum(x[:, :, i : i + w] for i in range(3))
    rows, columns = (np.convolve(np.ones(n), np.ones(3))[1:-1] for n in (h, w))
    return x * jnp.asarray(1 / np.outer(rows, columns), x.dtype)[None, :, :, None]


class Block(nn.Module):
    """Branches of x [B, H, W, C], whose channels are laid side by side, and a last one that pools.

    Attributes:
      branches: chains of layers.
      pool: of the last branch: "mean" or "max" of neighbours, then a 1 x 1 convolution, or
        "stride", the maxima at half the resolution.
      pooled: channels of that convolution.
    """

    branches: tuple[Chain, ...]
    pool: str
    pooled: int

    @nn.compact
    def __call__(self, x: Array) -> tuple[Array, Array]:
        """(all branches, the first alone)."""
        chains = [[*chain] for chain in self.branches]
        if self.pool != "stride":
            chains.append([Layer("branch_pool", self.pooled)])
        heads = [Unit(chain[0], name=chain[0].name) for chain in chains]
        # One matrix product serves all 1 x 1 convolutions of x. Means and 1 x 1 convolutions
        # commute, and of the convolution's fewer channels means take less time.
        first = {
            unit.name: unit.kernel(x.shape[-1])
            for unit in heads
            if unit.layer.kernel == (1, 1) and (self.pool, unit.name) != ("max", "branch_pool")
        }
        cuts = np.cumsum([kernel.shape[-1] for kernel in first.values()])[:-1]
        product = convolve(x, jnp.concatenate([*first.values()], axis=-1))
        first = dict(zip(first, jnp.split(product, cuts, axis=-1)))
        found = []
        for head, (_, *rest) in zip(heads, chains):
            h = first.get(head.name)
            if h is None:
                h = head(max_pool(x) if head.name == "branch_pool" else x)
            else:
                h = head.finish(mean_pool(h) if head.name == "branch_pool" else h)
            for step in rest:
                layers = (step,) if isinstance(step, Layer) else step
                h = jnp.concatenate([Unit(one, name=one.name)(h) for one in layers], axis=-1)
            found.append(h)
        if self.pool == "stride":
            found.append(max_pool(x, 2))
        return jnp.concatenate(found, axis=-1), found[0]


def _chain(name: str, *layers: tuple) -> Chain:
    """Layers called name_1, name_2, ...; one alone has no number."""
    if len(layers) == 1:
        return (Layer(name, *layers[0]),)
    return tuple(Layer(f"{name}_{i}", *layer) for i, layer in enumerate(layers, 1))


Branches = tuple[tuple[Chain, ...], str, int]
"""The fields of a ``Block``."""


def _wide(pooled: int) -> Branches:
    branches = (
        _chain("branch1x1", (64,)),
        _chain("branch5x5", (48,), (64, (5, 5))),
        _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, (3, 3))),
    )
    return branches, "mean", pooled


def _factored(c: int) -> Branches:
    across, down = (1, 7), (7, 1)
    branches = (
        _chain("branch1x1", (192,)),
        _chain("branch7x7", (c,), (c, across), (192, down)),
        _chain("branch7x7dbl", (c,), (c, down), (c, across), (c, down), (192, across)),
    )
    return branches, "mean", 192


def _split(pool: str) -> Branches:
    def both(name: str) -> tuple[Layer, Layer]:
        return Layer(f"{name}a", 384, (1, 3)), Layer(f"{name}b", 384, (3, 1))

    branches = (
        _chain("branch1x1", (320,)),
        (Layer("branch3x3_1", 384), both("branch3x3_2")),
        (*_chain("branch3x3dbl", (448,), (384, (3, 3))), both("branch3x3dbl_3")),
    )
    return branches, pool, 192


HALVED = ((3, 3), 2, "VALID")
STEM = (
    *(Layer("Conv2d_1a_3x3", 32, *HALVED), Layer("Conv2d_2a_3x3", 32, (3, 3), 1, "VALID")),
    *(Layer("Conv2d_2b_3x3", 64, (3, 3)), None),
    *(Layer("Conv2d_3b_1x1", 80), Layer("Conv2d_4a_3x3", 192, (3, 3), 1, "VALID"), None),
)
"""None halves the resolution."""
TO_17 = (
    _chain("branch3x3", (384, *HALVED)),
    _chain("branch3x3dbl", (64,), (96, (3, 3)), (96, *HALVED)),
)
TO_8 = (
    _chain("branch3x3", (192,), (320, *HALVED)),
    _chain("branch7x7x3", (192,), (192, (1, 7)), (192, (7, 1)), (192, *HALVED)),
)


def blocks(last_pool: str) -> dict[str, Branches]:
    """Name -> fields of every block, in order."""
    return {
        **{f"Mixed_5{i}": _wide(pooled) for i, pooled in zip("bcd", (32, 64, 64))},
        "Mixed_6a": (TO_17, "stride", 0),
        **{f"Mixed_6{i}": _factored(c) for i, c in zip("bcde", (128, 160, 160, 192))},
        "Mixed_7a": (TO_8, "stride", 0),
        **{"Mixed_7b": _split("mean"), "Mixed_7c": _split(last_pool)},
    }


class Inception(nn.Module):
    """(x [B, 299, 299, 3] in [-1, 1]) -> ``Outputs``, in float32.

    Means over 3 x 3 neighbours leave out those beyond the border, as TensorFlow's do. Other sides,
    from 75 pixels, give spatial features of another number.

    Attributes:
      classes: of the logits; 0 leaves the last layer out.
      last_pool: "max" as in the graph of 2015-12-05, by which FID is defined, where the last block
        pools maxima, by mistake; "mean" as in all other versions.
    """

    classes: int = 1008
    last_pool: str = "max"

    @nn.compact
    def __call__(self, x: Array) -> Outputs:
        for layer in STEM:
            x = Unit(layer, name=layer.name)(x) if layer else max_pool(x, 2)
        first = {}
        for name, fields in blocks(self.last_pool).items():
            x, first[name] = Block(*fields, name=name)(x)
        features = x.mean((1, 2))
        spatial = first["Mixed_6d"][..., :SPATIAL].reshape(len(x), -1)
        if not self.classes:
            return Outputs(features, spatial, None)
        logits = _Head(self.classes, name="fc")(features)
        return Outputs(features, spatial, logits)


class _Head(nn.Module):
    """Logits without the bias, which files hold all the same."""

    classes: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        kernel = self.param("kernel", normal(0.01), (x.shape[-1], self.classes))
        self.param("bias", zeros, (self.classes,))
        return jnp.matmul(x, kernel, precision=EXACT)
