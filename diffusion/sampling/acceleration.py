"""What makes an evaluation cheaper at some loss, as one setting of a sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from diffusion.denoiser import Denoise, Estimate, Stateful
from diffusion.levels import Array, NoiseLevel
from diffusion.models.token_merging import with_merged_tokens
from diffusion.sampling.feature_cache import When, cached


@dataclass(frozen=True)
class Shortcuts:
    """Caching and token merging; by default neither.

    Attributes:
      cache: number of evaluations -> when networks' deep parts are refreshed (``caching.every``
        ... with their options filled in); None: at each.
      keep: what of them is evaluated every time; see ``models.reuse``.
      guidance: number of evaluations -> when what guidance steers away from is evaluated ([R]
        bool); None: at each.
      merge: share of the tokens merged away, in [0, 0.75]; see ``models.token_merging``.
      merge_from: tokens of the maps from which on they are.
    """

    cache: Callable[[int], When] | None = None
    keep: int = 1
    guidance: Callable[[int], When] | None = None
    merge: float = 0.0
    merge_from: int = 1024

    def data(self, evaluations: int) -> dict[str, When]:
        """Arguments of the compiled sampler: when to do what, by "cache" and "guidance"."""
        functions = {"cache": self.cache, "guidance": self.guidance}
        return {name: f(evaluations) for name, f in functions.items() if f is not None}

    def cached(self, denoise: Denoise | Stateful, data: Mapping[str, When]) -> Denoise | Stateful:
        """With deep parts reused, if ``data`` says when."""
        return cached(denoise, data["cache"], self.keep) if "cache" in data else denoise

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
            merged = with_merged_tokens(denoise, self.merge, self.merge_from, key)
            return merged(x, level, *cond)

        return evaluate


NONE = Shortcuts()
"""Everything is evaluated."""
