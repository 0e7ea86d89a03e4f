"""Dropout of conditioning, which teaches one network the estimates that guidance compares.

A dropout is given the conditioning of a batch, the null conditioning and one number u [B] per
example, uniform in [0, 1), and gives the conditioning that the network is trained with. One number
decides on all signals of an example, so that shares that lie on each other drop signals together.
"""

from __future__ import annotations

from collections.abc import Callable

from diffusion.conditioning import Conditioning, drop
from diffusion.errors import check_range
from diffusion.levels import Array

Dropout = Callable[[Conditioning, Conditioning, Array], Conditioning]


def together(cond: Conditioning, null: Conditioning, u: Array, rate: float = 0.1) -> Conditioning:
    """All signals at once, in the share ``rate`` of the examples, for classifier-free guidance."""
    check_range("rate", rate, 0, 1)
    return drop(cond, null, u < rate) if rate else cond


def instruct(cond: Conditioning, null: Conditioning, u: Array, rate: float = 0.05) -> Conditioning:
    """InstructPix2Pix's (Brooks et al., 2023, section 3.2.1): text alone, both, picture alone.

    The text where u < 2 rate and the picture where rate <= u < 3 rate, so that each of the three
    happens in the share ``rate`` of the examples; rate lies in [0, 1/3].
    """
    check_range("rate", rate, 0, 1 / 3)
    kept = drop(cond, null, u < 2 * rate)
    return kept.replace(image=drop(cond.image, null.image, (rate <= u) & (u < 3 * rate)))


def image_prompt(
    cond: Conditioning, null: Conditioning, u: Array, rate: float = 0.05
) -> Conditioning:
    """IP-Adapter's (Ye et al., 2023, section 4.1.2): the picture alone, the text alone, both.

    The picture where u < rate or 2 rate <= u < 3 rate, the text where rate <= u < 3 rate; rate lies
    in [0, 1/3].
    """
    check_range("rate", rate, 0, 1 / 3)
    kept = drop(cond, null, (rate <= u) & (u < 3 * rate))
    picture = (u < rate) | ((2 * rate <= u) & (u < 3 * rate))
    return kept.replace(image_prompts=drop(cond.image_prompts, null.image_prompts, picture))


CHOICES = {f.__name__: f for f in (together, instruct, image_prompt)}
