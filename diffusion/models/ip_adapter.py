"""IP-Adapter: pictures as prompts, by cross-attention of their own (Ye et al., 2023).

Z = att(Q, K, V) + s att(Q, K', V') before a cross-attention's last projection, where K' = c W_k and
V' = c W_v are made from tokens c of the pictures. Every other part of the network stays as it is:
the second map is added from outside, where the network's ``Attend`` computes the first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from diffusion import specs
from diffusion.conditioning import Conditioning, ImagePrompt
from diffusion.errors import check_range
from diffusion.levels import Array
from diffusion.models.attention import Attend
from diffusion.models.kernels.attention import attend
from diffusion.models.surroundings import Around, image_network
from diffusion.models.unet import UNet

BLOCKS: dict[str, Mapping[str, Any]] = {
    "style": {"up": {"block_0": (0, 1, 0)}},
    "layout": {"down": {"block_2": (0, 1)}},
}
"""The blocks of SDXL that take style or layout over (InstantStyle; Wang et al., 2024)."""


class Site(NamedTuple):
    """An attention of a U-Net.

    Attributes:
      path: of its module, "down_blocks_0/attentions_0/transformer_blocks_0/attn2".
      block: of its block as diffusers calls it, "down.block_0", "up.block_1" or "mid".
      place: which of the block's attentions it is in.
      level: of the resolution, 0 the finest.
    """

    path: str
    block: str
    place: int
    level: int

    @property
    def crosses(self) -> bool:
        """Whether a transformer block has it for the context."""
        return self.path.endswith("/attn2")


def attentions(net: UNet) -> Iterator[Site]:
    """All attentions in the order down, up, mid, in which files number them."""
    levels = range(len(net.widths))
    rows = [("down", i, i, net.level_kinds("attention", i)) for i in levels]
    rows += [("up", i, level, net.up_kinds(level)) for i, level in enumerate(reversed(levels))]
    rows.append(("mid", 0, levels[-1], (net.mid_attention,) * max(net.mid_blocks - 1, 0)))
    for part, i, level, kinds in rows:
        module, block = f"{part}_blocks_{i}", f"{part}.block_{i}"
        if part == "mid":
            module, block = "mid_block", "mid"
        for j, kind in enumerate(kinds):
            at = f"{module}/attentions_{j}"
            if kind == "self":
                yield Site(at, block, j, level)
                continue
            for k in range(0 if kind == "projections" else kind):
                for name in ("attn1", "attn2"):
                    yield Site(f"{at}/transformer_blocks_{k}/{name}", block, j, level)


def cross_attentions(network: nn.Module) -> list[Site]:
    """The attentions that get a second map, in the order down, up, mid.

    Raises:
      ValueError: the network is no U-Net, or has no such attention.
    """
    net = image_network(network)
    found = [s for s in attentions(net) if s.crosses] if isinstance(net, UNet) else []
    if not found:
        raise ValueError(
            "an IP-Adapter is for U-Nets with cross-attention, such as Stable Diffusion's; this is "
            f"a {type(net).__name__}" + " without any" * isinstance(net, UNet)
        )
    return found


def block_factors(network: nn.Module, blocks: str | Mapping[str, Any]) -> np.ndarray:
    """A factor [A] for each cross-attention, from ``ip_adapter``'s ``blocks``.

    Raises:
      ValueError: the network has no such block, or another number of attentions in it.
    """
    sites, net = cross_attentions(network), image_network(network)
    if isinstance(blocks, str):
        if blocks == "all":
            return np.ones(len(sites), np.float32)
        if blocks not in BLOCKS:
            raise specs.unknown("blocks", blocks, ("all", *BLOCKS))
        if not net.added_embedding or len(net.widths) != 3:
            raise ValueError(
                f"blocks={blocks!r}: which blocks these are is known of SDXL alone; name this "
                'network\'s, as in blocks={"up": {"block_1": 1}}'
            )
        blocks = BLOCKS[blocks]
    counts = {site.block: site.place + 1 for site in sites}  # attentions of each block
    factors: dict[str, list[float]] = {}
    for part, value in blocks.items():
        names = [b.partition(".")[2] for b in counts if b.split(".")[0] == part]
        if not names:
            raise specs.unknown("blocks", part, {b.split(".")[0] for b in counts})
        value = value if isinstance(value, Mapping) else dict.fromkeys(names, value)
        for name, one in value.items():
            if name not in names:
                if names == [""]:
                    raise ValueError(f"blocks: {part} is one block, it has none called {name!r}")
                raise specs.unknown(f"blocks: {part}", name, names)
            block = f"{part}.{name}".rstrip(".")
            count = counts[block]
            several = isinstance(one, tuple | list)
            factors[block] = list(one) if several else [one] * count
            if len(factors[block]) != count:
                raise ValueError(f"blocks: {block} has {count} attentions, got factors {one}")
            for factor in factors[block]:
                if isinstance(factor, bool) or not isinstance(factor, int | float):
                    raise ValueError(f"blocks: {block}: expected numbers, got {one!r}")
                check_range(f"blocks: {block}", factor)
    given = [factors[s.block][s.place] if s.block in factors else 0 for s in sites]
    return np.array(given, np.float32)


class ImagePrompted(Around):
    """A U-Net that attends to pictures as well: the last of ``cond.image_prompts`` is its own.

    Without image prompts it computes what ``network`` does. ``network`` may again be one of these,
    with the prompts before the last, or another ``Around``; only the U-Net's attentions get a
    second map, not those of a ControlNet beside it.

    Attributes:
      projection: features of a picture -> tokens; a module of ``image_tokens``.
    """

    projection: nn.Module
    column: ClassVar[str] = "image_features"

    @nn.compact
    def __call__(
        self,
        x: Array,
        time: Array,
        cond: Conditioning,
        train: bool = False,
        control: Sequence[Array] | None = None,
        *,
        control_levels: Sequence[Array] = (),
        features: Sequence[int] = (),
    ) -> Array | tuple[Array, tuple[Array, ...]]:
        """``network``'s output, of the same arguments."""
        options: dict[str, Any] = {} if control is None else {"control": control}
        options |= {"control_levels": control_levels} if control_levels else {}
        options |= {"features": features} if features else {}
        if not cond.image_prompts:
            return self.network(x, time, cond, train=train, **options)
        *others, prompt = cond.image_prompts
        maps = self.maps(prompt, x.shape[1:3])
        cond = cond.replace(image_prompts=tuple(others))
        with nn.intercept_methods(_second_maps(maps)):
            return self.network(x, time, cond, train=train, **options)

    @nn.nowrap
    def maps(self, prompt: ImagePrompt, size: tuple[int, int]) -> dict[str, SecondMap]:
        """What is added at each cross-attention, by its path; ``size`` (h, w) is that of x."""
        tokens, sites = prompt.tokens, cross_attentions(self.network)
        if tokens is None and prompt.features is None:
            raise ValueError("an image prompt needs tokens [B, N, C], or features to make them of")
        tokens = self.projection(prompt.features) if tokens is None else tokens
        net, scale, found = image_network(self.network), prompt.scale, {}
        scale = jnp.ones((len(tokens), 1)) if scale is None else scale
        if scale.shape[1] not in (1, len(sites)):
            raise ValueError(
                f"an image prompt's scale has shape {scale.shape}; expected [B, 1], or "
                f"[B, {len(sites)}] with one for each cross-attention"
            )
        scale = jnp.broadcast_to(scale, (len(scale), len(sites)))
        masks: list[Array | None] = [None] * len(net.widths)
        if prompt.mask is not None:
            masks = [_resized(prompt.mask, halved(size, level)) for level in range(len(net.widths))]
        for i, site in enumerate(sites):
            width, mask = net.widths[site.level], masks[site.level]
            k, v = (
                nn.Dense(width, use_bias=False, dtype=net.dtype, name=f"{name}_{i}")(tokens)
                for name in ("to_k_ip", "to_v_ip")
            )
            found[site.path] = SecondMap(k, v, scale[:, i, None, None, None], mask)
        return found


class SecondMap(NamedTuple):
    """What is added at one attention.

    Attributes:
      k, v: [B, N, width].
      scale: [B, 1, 1, 1].
      mask: [B, h w, M], or None; with M > 1 there is one for each M-th part of the tokens.
    """

    k: Array
    v: Array
    scale: Array
    mask: Array | None

    def of(self, q: Array, implementation: str | None) -> Array:
        """s sum_m mask_m att(q, k_m, v_m) [B, L, H, D]."""
        count = 1 if self.mask is None else self.mask.shape[-1]
        parts = []
        for m in range(count):
            k, v = (
                jnp.split(a, count, axis=1)[m].reshape(len(a), -1, *q.shape[2:]).astype(q.dtype)
                for a in (self.k, self.v)
            )
            part = attend(q, k, v, None, implementation)
            parts.append(part if self.mask is None else part * self.mask[..., m, None, None])
        return (self.scale * sum(parts)).astype(q.dtype)


def _second_maps(maps: Mapping[str, SecondMap]) -> Callable:
    """Adds ``maps``, by the attentions' paths within the U-Net, wherever that is."""
    start: list[int] = []  # of these paths; caches of features call a U-Net under another path

    def add(call: Callable, args: tuple, kwargs: dict, context: Any) -> Any:
        module = context.module
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(module, UNet):
            start.append(len(module.path))
            try:
                return call(*args, **kwargs)
            finally:
                start.pop()
        out = call(*args, **kwargs)
        if not (isinstance(module, Attend) and start):
            return out
        own = maps.get("/".join(module.path[start[-1] : -1]))
        return out if own is None else out + own.of(args[0], module.implementation)

    return add


def halved(size: tuple[int, int], times: int) -> tuple[int, int]:
    """(height, width) at a level of a U-Net; halves are rounded up."""
    for _ in range(times):
        size = (-(-size[0] // 2), -(-size[1] // 2))
    return size


def _resized(mask: Array, size: tuple[int, int]) -> Array:
    """[B, H, W, M] -> [B, h w, M], bicubic as PyTorch's ``interpolate``."""
    rows, columns = (bicubic(old, new) for old, new in zip(mask.shape[1:3], size))
    mask = jnp.einsum("bhwm,yh,xw->byxm", mask, rows, columns, precision="highest")
    return mask.reshape(len(mask), -1, mask.shape[-1])


@lru_cache(maxsize=64)
def bicubic(old: int, new: int) -> np.ndarray:
    """[new, old] float32: Keys's cubic (1981), a = -3/4, not stretched where the side shrinks.

    Pixel i of n comes from (i + 1/2) N / n - 1/2; the border's pixels continue beyond it.
    """
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    matrix, first = np.zeros((new, old)), np.floor(centre).astype(int)
    for tap in range(-1, 3):
        t = np.abs(centre - first - tap)
        near, far = (1.25 * t - 2.25) * t * t + 1, ((-0.75 * t + 3.75) * t - 6) * t + 3
        place = np.clip(first + tap, 0, old - 1)
        np.add.at(matrix, (np.arange(new), place), np.where(t <= 1, near, far))
    return matrix.astype(np.float32)
