"""Guidance: transforms of a denoiser that give a denoiser.

x_t is the same in all terms, so guiding x_0_hat is the same as guiding eps or v. Where a method
remembers earlier evaluations the result is a ``Stateful`` denoiser, which ``sample`` takes too.
All work on levels with leaves () and [B], and on each image by itself. Numbers out of the ranges
that are given raise ValueError.
"""
# ruff: noqa: F401

from diffusion.sampling.guidance.extrapolation import (
    Rule,
    adaptive_projected,
    autoguidance,
    classifier_free,
    conditional,
    instruct,
    linear,
    perturbed_attention,
    rescaled,
)
from diffusion.sampling.guidance.reconstruction import (
    dps,
    moment_matched,
    pigdm,
    reconstruction,
    video,
)
from diffusion.sampling.guidance.transform import (
    classifier_guidance,
    clip,
    dynamic_threshold,
    interval,
)
