"""Conditioners: subjects (class labels, captions, prompts) -> what a network is conditioned on.

A conditioner is called with the subject of each sample and what to steer away from,

    cond, null = conditioner(params, ["a lighthouse", "a dog"], negative="blurry")

and gives two ``Conditioning``s of as many examples; ``null`` is None where nothing stands for
"none". Prompts of published pipelines have a conditioner of their own (``prompts``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import pretrained
from diffusion.conditioning import Conditioning, from_batch, null_like
from diffusion.models.clip import ClipText

Subject = int | str
Pair = tuple[Conditioning, Conditioning | None]


class Conditioner:
    """A model that is conditioned on nothing, whose subjects are only numbers; others derive.

    Attributes:
      subject: "label", "text" or "", the kind of subject that the model takes.
      suggestions: subjects to draw where none are given, such as all classes.
      null: whether something stands for none.
    """

    subject: str = ""
    suggestions: Sequence[Subject] = ()
    null: bool = False

    def __call__(
        self,
        params: Mapping[str, Any],
        subjects: Sequence[Subject],
        negative: Subject | Sequence[Subject] | None = None,
    ) -> Pair:
        """(conditioning, null), leaves [len(subjects), ...].

        Raises:
          ValueError: for a subject that the model does not know.
        """
        if negative is not None:
            self.check(negative)
        return Conditioning(), None

    def name(self, subject: Subject) -> str:
        """What pictures call a subject."""
        return str(subject) if self.subject else ""

    def check(self, subject: Subject) -> None:
        """Raises ValueError for a subject that the model does not know."""
        raise ValueError(f"this model knows neither labels nor texts, got {subject!r}")


@dataclass(frozen=True)
class Labels(Conditioner):
    """Class labels 0 .. count - 1; the null label is ``count``.

    Attributes:
      count: of classes.
      names: of the classes, for pictures and to ask by; may be empty.
      null: whether the model was also trained without labels.
    """

    count: int
    names: tuple[str, ...] = ()
    null: bool = True
    subject: str = "label"

    @property
    def suggestions(self) -> Sequence[Subject]:
        """Every class."""
        return range(self.count)

    def __call__(
        self,
        params: Mapping[str, Any],
        subjects: Sequence[Subject],
        negative: Subject | Sequence[Subject] | None = None,
    ) -> Pair:
        """Labels as numbers or by name; without ``negative`` the null label."""
        cond = Conditioning(label=np.array([self._label(s) for s in subjects], np.int32))
        if negative is None:
            return cond, null_like(cond, label=self.count) if self.null else None
        several = not isinstance(negative, (str, int))
        wrong = [self._label(n) for n in (negative if several else [negative])]
        return cond, cond.replace(label=np.resize(np.array(wrong, np.int32), len(subjects)))

    def name(self, subject: Subject) -> str:
        """The class's name, or its number."""
        label = self._label(subject)
        return self.names[label] if self.names else str(label)

    def check(self, subject: Subject) -> None:
        """Raises ValueError unless it is the number or the name of a class."""
        self._label(subject)

    def _label(self, subject: Subject) -> int:
        if isinstance(subject, str) and subject in self.names:
            return self.names.index(subject)
        number = int(subject) if isinstance(subject, str) and subject.isdecimal() else subject
        number = number if isinstance(number, (int, float, np.number)) else str(number)
        if isinstance(number, (str, bool)) or not np.isfinite(number) or number != int(number):
            known = ", ".join(self.names[:12]) + (", ..." if len(self.names) > 12 else "")
            raise ValueError(
                f"there is no class {subject!r}; choose 0..{self.count - 1}"
                + (f" or one of {known}" if self.names else "")
            )
        if not 0 <= number < self.count:
            raise ValueError(f"there is no class {subject!r}; choose 0..{self.count - 1}")
        return int(number)


@dataclass(frozen=True)
class Captions(Conditioner):
    """Captions for a network with a text encoder of its own, or embedded by a frozen one.

    Attributes:
      encode: captions -> fields of the conditioning [B, ...]; the empty caption stands for none.
      suggestions: captions to draw where none are given.
      null: whether the model was also trained without captions.
    """

    encode: Callable[[Sequence[str]], Mapping[str, Any]]
    suggestions: Sequence[Subject] = ()
    null: bool = True
    subject: str = "text"

    def __call__(
        self,
        params: Mapping[str, Any],
        subjects: Sequence[Subject],
        negative: Subject | Sequence[Subject] | None = None,
    ) -> Pair:
        """Each different caption is encoded once; without ``negative`` the empty one is null."""
        for subject in subjects:
            self.check(subject)
        cond = self._encoded(list(subjects))
        if negative is None:
            return cond, self._encoded([""] * len(subjects)) if self.null else None
        texts = [negative] * len(subjects) if isinstance(negative, str) else list(negative)
        return cond, self._encoded(texts)

    def check(self, subject: Subject) -> None:
        """Raises ValueError unless it is a text."""
        if not isinstance(subject, str):
            raise ValueError(f"the model takes captions, which are texts, got {subject!r}")

    def _encoded(self, texts: list[str]) -> Conditioning:
        different = list(dict.fromkeys(texts))
        index = np.array([different.index(text) for text in texts])
        rows = self.encode(different)
        return from_batch({name: jnp.asarray(value)[index] for name, value in rows.items()})


class FrozenEncoder:
    """A frozen CLIP encoder of captions, read when it is first used.

    Args:
      folder: as transformers saves it.
    """

    def __init__(self, folder: str | Path):
        self._folder, self._loaded = folder, None

    def __call__(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens [B, L] -> ``context`` [B, L, C] and ``pooled`` [B, C].

        No mask: like Stable Diffusion's, a network attends to the padding too.
        """
        if self._loaded is None:
            self._loaded = pretrained.load(self._folder, expected="CLIPTextModel")[:2]
        context, pooled = _embed(*self._loaded, ids)
        return {"context": np.asarray(context), "pooled": np.asarray(pooled)}


@partial(jax.jit, static_argnums=0)
def _embed(net: ClipText, params: Any, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    encoded = net.apply({"params": params}, ids)
    return encoded.last, encoded.pooled
