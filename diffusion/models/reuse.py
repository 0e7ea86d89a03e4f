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

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from diffusion.levels import Array
from diffusion.models.dit import Block, DiT
from diffusion.models.fields import per_level
from diffusion.models.surroundings import image_network
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
        run = _Run(keep)
        with nn.intercept_methods(run):
            result = function(*args, **kwargs)
        return result, tuple(run.features)

    return recorded


def reuse(function: Callable[..., Any], keep: int, features: Features) -> Callable[..., Any]:
    """``function`` with its networks' deep parts replaced by the features from ``record``."""

    def reused(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(_Run(keep, features)):
            return function(*args, **kwargs)

    return reused


def inputs(function: Callable[..., Any], keep: int, features: Features) -> Callable[..., Features]:
    """What the shallow parts compute from ``function``'s arguments, before anything is reused.

    For a U-Net this is the last skip connection of the shallow part, for a DiT the sum that its
    first ``keep`` blocks add to the tokens, with keep = 0 the network's input. A change of it shows
    cheaply that the deep part's features would change. Only the shapes of ``features`` matter.
    """

    def shallow(*args: Any, **kwargs: Any) -> Features:
        run = _Run(keep, features, seen=[])
        with nn.intercept_methods(run):
            function(*args, **kwargs)
        return tuple(run.seen)

    return shallow


def check(network: nn.Module, keep: int) -> None:
    """Raises ValueError if the network has no shallow part of this size."""
    if keep == 0:
        return
    network = image_network(network)
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


class _Run:
    """Intercepts one run of a function, which records ``features`` or reuses those given.

    It finds the calls of networks and passes each module within one to that network's visitor.
    ``seen`` collects what ``inputs`` returns.
    """

    def __init__(self, keep: int, features: Features | None = None, seen: list | None = None):
        self.keep, self.seen, self.features = keep, seen, []
        self.kept = None if features is None else iter(features)
        self.prefix: tuple[str, ...] = ()
        self.visit: Visit | None = None

    def __call__(self, call: Call, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if self.visit is not None:
            path = "/".join(module.path[len(self.prefix) :])
            return self.visit(module, path, call, args, kwargs)
        if self.keep == 0 and module.path == ():
            return self._whole(call, args, kwargs)
        if self.keep == 0 or not isinstance(module, (UNet, DiT)):
            return call(*args, **kwargs)
        check(module, self.keep)
        if module.remat:  # features cannot leave blocks that are recomputed
            plain = module.clone(remat=False, parent=None, name=None)
            return plain.apply(module.variables, *args, **kwargs)
        plan = self._blocks if isinstance(module, DiT) else self._levels
        self.prefix, self.visit = module.path, plan(module)
        try:
            return call(*args, **kwargs)
        finally:
            self.visit = None

    def _whole(self, call: Call, args: tuple, kwargs: dict) -> Any:
        """A network's output, which is reused as a whole."""
        if self.kept is None:
            self.features.append(call(*args, **kwargs))
            return self.features[-1]
        if self.seen is not None:
            self.seen.append(args[0])
        return next(self.kept)

    def _blocks(self, net: DiT) -> Visit:
        """Of a DiT, the sum of the last blocks' additions replaces those from ``keep`` on."""
        start = []

        def visit(module: nn.Module, path: str, call: Call, args: tuple, kwargs: dict) -> Any:
            if not isinstance(module, Block):
                return call(*args, **kwargs)
            number, x = int(path.removeprefix("blocks_")), args[0]
            if number == (self.keep if self.kept is None else 0):
                start.append(x)
            if self.kept is None or number < self.keep:
                result = call(*args, **kwargs)
                if number == net.depth - 1:
                    self.features.append(result - start[0])
                return result
            if number > self.keep:
                return x
            if self.seen is not None:
                self.seen.append(x - start[0])
            return x + next(self.kept)

        return visit

    def _levels(self, net: UNet) -> Visit:
        """Of a U-Net, the deep modules' output at the seam is replaced.

        The seam is the shallow ResNet block that reads their output and a skip connection.
        """
        skips, readers = _skips(net), _readers(net)
        deep = {path for path, _ in skips[self.keep :]} | {"mid_block"}
        deep |= {path.replace("resnets", "attentions") for path in deep}
        deep |= {path for reader in readers[: -self.keep] for path in reader}
        seam, own = readers[-self.keep][0], net.widths[skips[self.keep - 1][1]]

        def visit(module: nn.Module, path: str, call: Call, args: tuple, kwargs: dict) -> Any:
            if self.kept is not None and path in deep:
                return jnp.zeros(_shape_after(module, args[0], kwargs), args[0].dtype)
            if path != seam:
                return call(*args, **kwargs)
            x, *others = args
            if self.kept is None:
                self.features.append(x[..., :-own])
            else:
                if self.seen is not None:
                    self.seen.append(x[..., -own:])
                x = jnp.concatenate([next(self.kept), x[..., -own:]], axis=-1)
            return call(x, *others, **kwargs)

        return visit


def _shape_after(module: nn.Module, x: Array, kwargs: dict) -> tuple[int, ...]:
    """The shape of a U-Net module's output for x, called with ``kwargs`` beside it."""
    b, h, w, c = x.shape
    resample = getattr(module, "resample", None)
    if isinstance(module, Downsample) or resample is average_pool:
        h, w = -(-h // 2), -(-w // 2)
    elif isinstance(module, Upsample) or resample is nearest_upsample:
        h, w = kwargs.get("size", (2 * h, 2 * w))
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
