"""Networks whose deep part is not evaluated again: its features at an earlier call replace it.

A network has a shallow part, which is evaluated in every call, and a deep part. ``record`` runs a
function that calls networks and also returns the features that go from each deep part to the
shallow one; ``reuse`` runs it with these features, without the deep parts. Both intercept the calls
of modules: networks have no code for it, and parameters are the same. ``keep`` is the size of the
shallow part:

- 0: nothing. The whole output is reused, of any network.
- of a ``UNet``, the first ``keep`` skip connections (the first convolution's output, then one per
  ResNet block and downsampling), with the blocks that write and read them. The features are the
  last of these blocks' input from below (DeepCache, Ma et al., 2023, section 3.3, whose skip branch
  m is keep = m).
- of a ``DiT``, the first ``keep`` blocks. The feature is the sum that all other blocks add to the
  tokens (the residual of first-block caching and TeaCache, Liu et al., 2024; Delta-DiT, Chen et
  al., 2024).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.dit import Block, DiT
from diffusion.models.fields import per_level
from diffusion.models.text_to_image import TextToImage
from diffusion.models.unet import UNet
from diffusion.models.unet_blocks import (
    Downsample,
    ResnetBlock,
    Upsample,
    average_pool,
    nearest_upsample,
)

Features = tuple[Any, ...]
"""The features of each network call, in the calls' order."""


def record(function: Callable[..., Any], keep: int) -> Callable[..., tuple[Any, Features]]:
    """``function``, which also returns the features for ``reuse``.

    Args:
      function: calls networks when it is called, as a denoiser does; not jitted by itself.
      keep: size of the shallow part, as described above.
    """

    def recorded(*args: Any, **kwargs: Any) -> tuple[Any, Features]:
        features: list[Any] = []
        with nn.intercept_methods(_Interceptor(keep, lambda plan: plan.record(features))):
            result = function(*args, **kwargs)
        return result, tuple(features)

    return recorded


def reuse(function: Callable[..., Any], keep: int, features: Features) -> Callable[..., Any]:
    """``function`` with its networks' deep parts replaced by the features from ``record``."""

    def reused(*args: Any, **kwargs: Any) -> Any:
        kept = iter(features)
        with nn.intercept_methods(_Interceptor(keep, lambda plan: plan.reuse(kept))):
            return function(*args, **kwargs)

    return reused


def inputs(function: Callable[..., Any], keep: int, features: Features) -> Callable[..., Features]:
    """What the shallow parts compute from ``function``'s arguments, before anything is reused.

    For a U-Net this is the last skip connection of the shallow part, for a DiT the sum that its
    first ``keep`` blocks add to the tokens, with keep = 0 the network's input. A change of it shows
    cheaply that the deep part's features would change. Only the shapes of ``features`` matter.
    """

    def shallow(*args: Any, **kwargs: Any) -> Features:
        kept, seen = iter(features), []
        with nn.intercept_methods(_Interceptor(keep, lambda plan: plan.reuse(kept, seen))):
            function(*args, **kwargs)
        return tuple(seen)

    return shallow


def check(network: nn.Module, keep: int) -> None:
    """Raises ValueError if the network has no shallow part of this size."""
    if keep == 0:
        return
    network = network.image if isinstance(network, TextToImage) else network
    if isinstance(network, DiT) and network.scan:
        raise ValueError(
            f"keep={keep} needs single blocks, but a DiT with scan=True loops over them; "
            "0 reuses the whole output"
        )
    most = len(_skips(network)) if isinstance(network, UNet) else 0
    most = network.depth - 1 if isinstance(network, DiT) else most
    if not 0 < keep <= most:
        kind = type(network).__name__
        unit = "skip connections" if isinstance(network, UNet) else "blocks before the last"
        reason = f"it has {most} {unit}" if most else "only U-Nets and DiTs have a deep part"
        raise ValueError(f"keep={keep} of this {kind}: {reason}; 0 reuses the whole output")


Call = Callable[..., Any]
Visit = Callable[[nn.Module, str, Call, tuple, dict], Any]  # (module, its path, call, args, kwargs)


class _Interceptor:
    """Finds the calls of networks, and passes each module within one to that network's visitor."""

    def __init__(self, keep: int, make: Callable[[Any], Visit]):
        self.keep, self.make = keep, make
        self.prefix: tuple[str, ...] | None = None
        self.visit: Visit | None = None

    def __call__(self, call: Call, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if self.visit is not None:
            path = "/".join(module.path[len(self.prefix) :])
            return self.visit(module, path, call, args, kwargs)
        if not (isinstance(module, (UNet, DiT)) if self.keep else module.path == ()):
            return call(*args, **kwargs)
        if self.keep and module.remat:  # features cannot leave blocks that are recomputed
            plain = module.clone(remat=False, parent=None, name=None)
            return plain.apply(module.variables, *args, **kwargs)
        self.prefix, self.visit = module.path, self.make(_plan(module, self.keep))
        try:
            if self.keep == 0:
                return self.visit(module, "", call, args, kwargs)
            return call(*args, **kwargs)
        finally:
            self.prefix = self.visit = None


def _plan(network: nn.Module, keep: int) -> Any:
    check(network, keep)
    if keep == 0:
        return _Whole()
    if isinstance(network, DiT):
        return _Blocks(keep, network.depth)
    return _unet_plan(network, keep)


class _Whole:
    """A network whose whole output is reused."""

    def record(self, features: list) -> Visit:
        def visit(module: nn.Module, path: str, call: Call, args: tuple, kwargs: dict) -> Any:
            result = call(*args, **kwargs)
            if not path:
                features.append(result)
            return result

        return visit

    def reuse(self, kept: Iterator, seen: list | None = None) -> Visit:
        def visit(module: nn.Module, path: str, call: Call, args: tuple, kwargs: dict) -> Any:
            if seen is not None:
                seen.append(args[0])
            return next(kept)

        return visit


class _Blocks(NamedTuple):
    """A DiT's blocks; the sum of their additions replaces those from number ``first`` on."""

    first: int
    depth: int

    def record(self, features: list) -> Visit:
        start = []

        def visit(module: nn.Module, path: str, call: Call, args: tuple, kwargs: dict) -> Any:
            if path == f"blocks_{self.first}":
                start.append(args[0])
            result = call(*args, **kwargs)
            if path == f"blocks_{self.depth - 1}":
                features.append(result - start[0])
            return result

        return visit

    def reuse(self, kept: Iterator, seen: list | None = None) -> Visit:
        start = []

        def visit(module: nn.Module, path: str, call: Call, args: tuple, kwargs: dict) -> Any:
            if not isinstance(module, Block):
                return call(*args, **kwargs)
            number = int(path.removeprefix("blocks_"))
            if number == 0:
                start.append(args[0])
            if number < self.first:
                return call(*args, **kwargs)
            if number > self.first:
                return args[0]
            if seen is not None:
                seen.append(args[0] - start[0])
            return args[0] + next(kept)

        return visit


class _Levels(NamedTuple):
    """The deep modules of a U-Net, and where their output enters the shallow part.

    Attributes:
      deep: paths of the deep modules.
      seam: path of the shallow ResNet block that reads their output and a skip connection.
      own: channels of that skip connection.
    """

    deep: frozenset[str]
    seam: str
    own: int

    def record(self, features: list) -> Visit:
        def visit(module: nn.Module, path: str, call: Call, args: tuple, kwargs: dict) -> Any:
            if path == self.seam:
                features.append(args[0][..., : -self.own])
            return call(*args, **kwargs)

        return visit

    def reuse(self, kept: Iterator, seen: list | None = None) -> Visit:
        def visit(module: nn.Module, path: str, call: Call, args: tuple, kwargs: dict) -> Any:
            if path in self.deep:
                return jnp.zeros(_shape_after(module, args[0]), args[0].dtype)
            if path == self.seam:
                x, *others = args
                if seen is not None:
                    seen.append(x[..., -self.own :])
                x = jnp.concatenate([next(kept), x[..., -self.own :]], axis=-1)
                return call(x, *others, **kwargs)
            return call(*args, **kwargs)

        return visit


def _shape_after(module: nn.Module, x: Array) -> tuple[int, ...]:
    """The shape of a U-Net module's output for x."""
    b, h, w, c = x.shape
    resample = getattr(module, "resample", None)
    if isinstance(module, Downsample) or resample is average_pool:
        h, w = h // 2, w // 2
    elif isinstance(module, Upsample) or resample is nearest_upsample:
        h, w = 2 * h, 2 * w
    return (b, h, w, module.width if isinstance(module, ResnetBlock) else c)


def _skips(net: UNet) -> list[tuple[str, int]]:
    """(path of the module that writes it, level) of each skip connection, finest first."""
    found = [("conv_in", 0)]
    for level in range(len(net.widths)):
        at = f"down_blocks_{level}"
        found += [(f"{at}/resnets_{j}", level) for j in range(per_level(net.blocks, level))]
        if level < len(net.widths) - 1:
            found.append((f"{at}/downsamplers_0", level))
    return found


def _readers(net: UNet) -> list[list[str]]:
    """For each skip connection, coarsest first, the up blocks' modules from its reader on."""
    found = []
    for i, level in enumerate(reversed(range(len(net.widths)))):
        last = per_level(net.blocks, level)
        for j in range(last + 1):
            at = f"up_blocks_{i}"
            after = [f"{at}/upsamplers_0"] if j == last and level > 0 else []
            found.append([f"{at}/resnets_{j}", f"{at}/attentions_{j}", *after])
    return found


def _unet_plan(net: UNet, keep: int) -> _Levels:
    skips, readers = _skips(net), _readers(net)
    deep = {path for path, _ in skips[keep:]} | {"mid_block"}
    deep |= {path.replace("resnets", "attentions") for path in deep}
    deep |= {path for reader in readers[:-keep] for path in reader}
    return _Levels(frozenset(deep), readers[-keep][0], net.widths[skips[keep - 1][1]])
