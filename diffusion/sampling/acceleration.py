"""What makes an evaluation cheaper at some loss: caches and merged tokens.

    accelerate(cache(every(3), keep=1), merge_tokens(0.5)).at(evaluations)

Each function below gives some fields of an ``Acceleration``, which is a pytree: another schedule
of as many evaluations is other data of the same compiled sampler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from diffusion.denoiser import Denoise, Estimate, Stateful
from diffusion.levels import Array, NoiseLevel
from diffusion.models import token_merging
from diffusion.sampling import feature_cache
from diffusion.sampling.feature_cache import Schedule, When

Part = Mapping[str, Any]  # fields of an Acceleration


@flax.struct.dataclass
class Acceleration:
    """Caching and token merging; by default neither.

    ``cache`` and ``guidance`` say when networks' deep parts, and what guidance steers away from,
    are evaluated; None means at each evaluation. For the others see ``cache`` and ``merge_tokens``.
    """

    cache: Schedule | When | None = None
    guidance: Schedule | When | None = None
    keep: int = flax.struct.field(pytree_node=False, default=1)
    merge: float = flax.struct.field(pytree_node=False, default=0.0)
    at_least: int = flax.struct.field(pytree_node=False, default=1024)

    @property
    def remembers(self) -> bool:
        """Whether an evaluation depends on earlier ones."""
        return self.cache is not None or self.guidance is not None

    def at(self, evaluations: int) -> Acceleration:
        """With each schedule's refreshes for so many evaluations: what the sampler is given."""
        cache, guidance = (s and s(evaluations) for s in (self.cache, self.guidance))
        if guidance is not None and jnp.ndim(guidance) == 0:
            raise ValueError("guidance_cache takes no threshold; choose every, dense or at")
        return self.replace(cache=cache, guidance=guidance)

    def cached(self, denoise: Denoise | Stateful) -> Denoise | Stateful:
        """A denoiser with its networks' deep parts reused, if they are."""
        if self.cache is None:
            return denoise
        return feature_cache.cached(denoise, self.cache, self.keep)

    def merged(self, denoise: Callable[..., Any]) -> Callable[..., Any]:
        """A denoiser, conditional or not, with tokens merged.

        Destinations are chosen anew at each noise level, the same ones for all images and runs.
        """
        if not self.merge:
            return denoise

        def evaluate(x: Array, level: NoiseLevel, *cond: Any) -> Array | Estimate:
            # Levels per image: any of them will do.
            bits = jax.lax.bitcast_convert_type(jnp.ravel(level.t)[0].astype("float32"), "uint32")
            key = jax.random.fold_in(jax.random.key(0), bits)
            merged = token_merging.with_merged_tokens(denoise, self.merge, self.at_least, key)
            return merged(x, level, *cond)

        return evaluate


NONE = Acceleration()
"""Everything is evaluated."""


def cache(schedule: Schedule, keep: int = 1) -> Part:
    """Networks' deep parts are evaluated at the refreshes of ``schedule`` and reused in between.

    ``keep`` skip connections of a U-Net, or blocks of a DiT, are evaluated every time; 0 reuses the
    whole output.
    """
    _check_schedule("cache", schedule)
    if keep < 0:
        raise ValueError(f"keep must be >= 0, got {keep}")
    return {"cache": schedule, "keep": keep}


def guidance_cache(schedule: Schedule) -> Part:
    """What guidance steers away from is evaluated at the refreshes of ``schedule`` only."""
    _check_schedule("guidance_cache", schedule)
    return {"guidance": schedule}


def merge_tokens(ratio: float, at_least: int = 1024) -> Part:
    """In self-attentions over images, a ratio in [0, 0.75] of the tokens is merged away.

    Maps of fewer than ``at_least`` tokens stay as they are.
    """
    if not 0 <= ratio <= token_merging.MOST:
        raise ValueError(f"ratio must lie in [0, {token_merging.MOST}], got {ratio}")
    if at_least < 1:
        raise ValueError(f"at_least must be positive, got {at_least}")
    return {"merge": ratio, "at_least": at_least}


def accelerate(*parts: Part) -> Acceleration:
    """All of them together: each kind once at most, and one of the two caches."""
    fields = [name for part in parts for name in part]
    if len(set(fields)) < len(fields):
        raise ValueError("expected each of cache, guidance_cache and merge_tokens once at most")
    if "cache" in fields and "guidance" in fields:
        raise ValueError(
            "cache reuses both of guidance's estimates: guidance_cache has no place beside it"
        )
    return Acceleration(**{name: value for part in parts for name, value in part.items()})


def _check_schedule(name: str, schedule: Any) -> None:
    if not callable(schedule):
        raise ValueError(f"{name} goes by a schedule, as in {name}(every(3)), got {schedule!r}")


CHOICES = {f.__name__: f for f in (cache, guidance_cache, merge_tokens)}
