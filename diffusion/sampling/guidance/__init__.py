"""Guidance: transforms of a denoiser that give a denoiser.

x_t is the same in all terms, so guiding x_0_hat is the same as guiding eps or v. Where a method
remembers earlier evaluations the result is a ``Stateful`` denoiser, which ``sample`` takes too.
All work on levels with leaves () and [B], and on each image by itself.
"""

from diffusion.sampling.guidance._old import (
    classifier_free,
    clip,
    conditional,
    dynamic_threshold,
    interval,
)
from diffusion.sampling.guidance.reconstruction import (
    dps,
    moment_matched,
    pigdm,
    reconstruction,
    video,
)

__all__ = [
    "classifier_free",
    "clip",
    "conditional",
    "dps",
    "dynamic_threshold",
    "interval",
    "moment_matched",
    "pigdm",
    "reconstruction",
    "video",
]
