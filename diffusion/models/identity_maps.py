"""Networks with some self-attention maps replaced by the identity, without a change to them.

Every token then receives its own value, which is the perturbed estimate of perturbed-attention
guidance (Ahn et al., 2024). Parameters are the same, and cross-attention stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax

from diffusion.models.attention import Attend


def with_identity_maps(function: Callable[..., Any], blocks: str) -> Callable[..., Any]:
    """``function`` with the identity as the map of the self-attentions that ``blocks`` names.

    Args:
      function: calls the network when it is called, as a denoiser does. It must not be jitted by
        itself, since jit would use again what it traced before.
      blocks: regular expression that is searched for in the attentions' paths in the module tree
        (``self_attention_paths``): ``mid_block``, ``blocks_(3|4)/``. In a DiT with ``scan=True``
        all blocks have one path.
    """

    def identity(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if _is_self_attention(context) and re.search(blocks, _path(context.module)):
            return args[2]
        return call(*args, **kwargs)

    def changed(*args: Any, **kwargs: Any) -> Any:
        with nn.intercept_methods(identity):
            return function(*args, **kwargs)

    return changed


def self_attention_paths(function: Callable[..., Any], *args: Any) -> list[str]:
    """Paths of the self-attentions that ``function(*args)`` calls: "mid_block/attentions_0/", ...

    Nothing is computed: args may be ``jax.ShapeDtypeStruct``.
    """
    paths = set()

    def note(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        if _is_self_attention(context):
            paths.add(_path(context.module))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        jax.eval_shape(function, *args)
    return sorted(paths)


def middle_block(paths: Sequence[str]) -> str:
    """Regular expression of the middle self-attentions among ``self_attention_paths``' paths.

    A U-Net's are those of its mid block. Of numbered blocks, a DiT's, it is the middle one; blocks
    that are scanned over have one path.
    """
    numbers = {found[1] for path in paths if (found := re.search(r"(?:^|/)blocks_(\d+)/", path))}
    if any("mid_block/" in path for path in paths) or not paths:
        return "mid_block/"
    return f"blocks_{len(numbers) // 2}/" if numbers else "blocks/"


def _is_self_attention(context: nn.module.InterceptorContext) -> bool:
    """Whether it is called, of the network itself: the maps of ControlNets around it stay."""
    module = context.module
    if not (isinstance(module, Attend) and context.method_name == "__call__" and module.to_itself):
        return False
    return not any(part.startswith("nets_") for part in module.path)


def _path(attend: Attend) -> str:
    """Path of the module that the ``Attend`` works for, with a slash at the end."""
    return "/".join(attend.path[:-1]) + "/"
