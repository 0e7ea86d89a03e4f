"""Sentences around a word that a model is to learn (textual inversion; Gal et al., 2023)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from diffusion.specs import unknown

_KINDS = ("photo", "picture", "close-up", "rendering", "good photo", "bright photo", "dark photo")
_SIGHTS = ("cropped", "blurred", "clean", "dirty", "large", "small", "nice", "strange", "cool")
OBJECT = (
    *(f"a {kind} of a {{}}" for kind in _KINDS),
    *(f"a {kind} of the {{}}" for kind in _KINDS),
    *(f"a photo of a {sight} {{}}" for sight in _SIGHTS),
    "a photo of my {}",
    "a photo of one {}",
    "{}",
    "the {} from near by",
)
"""27 sentences about a thing."""
_ART = ("painting", "drawing", "picture", "rendering")
STYLE = (
    *(f"a {art} in the style of {{}}" for art in _ART),
    *(f"a {sight} painting in the style of {{}}" for sight in _SIGHTS),
    "a cropped drawing in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a dark painting in the style of {}",
    "a good painting in the style of {}",
    "a detail of a painting in the style of {}",
)
"""19 sentences about a style."""
KINDS = {"object": OBJECT, "style": STYLE}


def sentences(kind: str, captions: Sequence[str]) -> list[str]:
    """All that training may see of captions, each once: as they are, or in the kind's sentences."""
    different = dict.fromkeys(captions)
    return [text.format(caption) for caption in different for text in KINDS.get(kind, ("{}",))]


@dataclasses.dataclass(frozen=True)
class Template:
    """A caption in one of many sentences.

    Attributes:
      kind: of the sentences, "object" or "style".
    """

    kind: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown("template", self.kind, KINDS)

    def __call__(self, caption: str, seed: Sequence[int]) -> str:
        """The sentence that ``seed`` chooses, with the caption in it."""
        sentences = KINDS[self.kind]
        return sentences[np.random.default_rng(seed).integers(len(sentences))].format(caption)
