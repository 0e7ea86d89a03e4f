"""From ``config.sampler`` to what makes evaluations cheaper: caching and token merging."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import flax.linen as nn
from ml_collections import ConfigDict

from diffusion import specs
from diffusion.errors import field, wrong_types
from diffusion.models import reuse, token_merging
from diffusion.models.text_to_image import TextToImage
from diffusion.models.unet import UNet
from diffusion.models.unet_fields import all_kinds
from diffusion.sampling import feature_cache
from diffusion.sampling.acceleration import Shortcuts
from diffusion.sampling.feature_cache import When

SCHEDULES = specs.choices(feature_cache, "every dense at")
CACHES = SCHEDULES | specs.choices(feature_cache, "adaptive")


def make(config: ConfigDict, networks: Mapping[str, nn.Module], evaluations: int) -> Shortcuts:
    """The shortcuts of a config.

    Args:
      config: of training or of --mode=generate.
      networks: those that an evaluation calls, by what errors call them ("" is the model).
      evaluations: of the sampler, to check schedules with.

    Raises:
      ValueError: for impossible settings; the message names the field.
    """
    c = config.sampler
    cache = _schedule(c.cache, CACHES, "config.sampler.cache", evaluations)
    guidance = _schedule(c.guidance_cache, SCHEDULES, "config.sampler.guidance_cache", evaluations)
    if cache and guidance:
        raise ValueError(
            f"config.sampler.cache={c.cache!r} reuses both of guidance's estimates: "
            f"guidance_cache={c.guidance_cache!r} has no place beside it"
        )
    if cache:
        for name, network in networks.items():
            with field(f"config.sampler.cache_keep={c.cache_keep}{name and f', {name}'}"):
                reuse.check(network, c.cache_keep)
    if not 0 <= c.merge_tokens <= token_merging.MOST:
        raise ValueError(
            f"config.sampler.merge_tokens={c.merge_tokens} must lie in [0, {token_merging.MOST}]"
        )
    if c.merge_tokens and not isinstance(_image(networks[""]), UNet):
        kind = type(_image(networks[""])).__name__
        raise ValueError(
            f"config.sampler.merge_tokens={c.merge_tokens} merges tokens of U-Nets; this is a "
            f"{kind}, whose tokens stay apart"
        )
    return Shortcuts(cache, c.cache_keep, guidance, c.merge_tokens, c.merge_from)


def notes(config: ConfigDict, network: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Which settings have no effect. ``shape`` is that of the data."""
    c, found = config.sampler, []
    if c.guidance_cache and c.guidance == 1:
        found.append(f"config.sampler.guidance_cache={c.guidance_cache!r}: nothing is guided")
    if c.merge_tokens:
        levels = [level for kind, level in all_kinds(_image(network)) if kind != 0]
        maps = {(shape[0] >> level) * (shape[1] >> level) for level in levels}
        if not any(tokens >= c.merge_from for tokens in maps):
            found.append(
                f"config.sampler.merge_tokens={c.merge_tokens} has no effect: the model's largest "
                f"attention has {max(maps, default=0)} tokens, merge_from={c.merge_from}"
            )
    return found


def _schedule(
    text: str, known: Mapping[str, Callable], called: str, evaluations: int
) -> Callable[[int], When] | None:
    if not text:
        return None
    filled = ("evaluations",)
    schedule = specs.function(text, known, called, filled=filled)

    def made(evaluations: int) -> When:
        with field(f"{called}={text!r}"), wrong_types():
            return schedule(evaluations=evaluations)

    made(evaluations)  # to find mistakes in time
    return made


def _image(network: nn.Module) -> nn.Module:
    return network.image if isinstance(network, TextToImage) else network
