"""What figures are called in tables and pictures, and whether higher or lower is better."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from diffusion.evaluation.metrics.metric import ENDINGS

HIGHER, LOWER, NEITHER = "higher", "lower", ""


class Merit(NamedTuple):
    """What a figure is.

    Attributes:
      label: for people.
      better: "higher", "lower", or "" where neither is.
      log: whether its axis is logarithmic.
      percent: whether it is a share that is shown in percent.
    """

    label: str
    better: str = NEITHER
    log: bool = False
    percent: bool = False


KNOWN = {
    "recognised": Merit("recognised", HIGHER, percent=True),
    "fid": Merit("FID", LOWER, log=True),
    "fd": Merit("Fréchet distance", LOWER, log=True),
    "sfid": Merit("sFID", LOWER, log=True),
    "kid": Merit("KID", LOWER),
    "cmmd": Merit("CMMD", LOWER),
    "is": Merit("Inception score", HIGHER),
    "precision": Merit("precision", HIGHER),
    "recall": Merit("recall", HIGHER),
    "density": Merit("density", HIGHER),
    "coverage": Merit("coverage", HIGHER),
    "clip_score": Merit("CLIP score", HIGHER),
    "clip_cosine": Merit("CLIP cosine", HIGHER),
    "caption_similarity": Merit("caption similarity", HIGHER),
    "r_precision": Merit("R-precision", HIGHER, percent=True),
    "diversity": Merit("LPIPS diversity"),
    "retrieval_first": Merit("own caption is the nearest", HIGHER),
    "retrieval_among_10": Merit("own caption is among the ten nearest", HIGHER),
    "sliced_wasserstein": Merit("sliced Wasserstein distance", LOWER, log=True),
    "energy_distance": Merit("energy distance", LOWER, log=True),
    "bits_per_dim": Merit("bits per dimension", LOWER),
    "nearest_ratio": Merit("nearest / real"),
    "closer": Merit("closer to training data than 99 % of held-out", percent=True),
    "authentic": Merit("authentic", percent=True),
    "copying_z": Merit("copying, z"),
    "rmse": Merit("distance to the exact flow (RMSE)", LOWER, log=True),
}
"""By the beginning of a figure's name; the rest of the name says of which network. The main figures
come first."""

ASIDE = ("_std", "_chance", "_standard_error", ".standard_error", "_error", "_by_chance", *ENDINGS)
"""Ends of names of figures that only accompany others."""
PER_CLASS = "_per_class"


def merit(name: str) -> Merit:
    """What the figure of a name is: "fd_pixels_half" is the "Fréchet distance (pixels half)"."""
    place = _place(name)
    if place is None:
        return Merit(name)
    known = KNOWN[place]
    parts = [part.removeprefix(place).strip("_").replace("_", " ") for part in name.split(".")]
    rest = " ".join(part for part in parts if part)
    return known._replace(label=f"{known.label} ({rest})" if rest else known.label)


def _place(name: str) -> str | None:
    """The longest of the known beginnings that a name, or its last part, has."""
    if name.endswith(ASIDE):
        return None
    parts = name.split(".")
    own = [k for k in KNOWN for part in parts if part == k or part.startswith(f"{k}_")]
    return max(own, key=len, default=None)


def ordered(names: Iterable[str]) -> list[str]:
    """Names with the main figures first, and those of which nothing is known last."""
    order = list(KNOWN)

    def rank(name: str) -> tuple[int, str]:
        place = _place(name)
        return (len(order) if place is None else order.index(place), name)

    return sorted(set(names), key=rank)


def figures(result: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The float figures in a result, nested ones by dotted names."""
    found = {}
    for name, value in result.items():
        if isinstance(value, Mapping):
            found |= figures(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            found[prefix + name] = value
    return found


def main(names: Iterable[str]) -> list[str]:
    """The figures of all examples, in order, without those that only accompany others."""
    return ordered(n for n in names if not n.endswith(ASIDE) and PER_CLASS not in n)


def beside(name: str, ending: str) -> str:
    """The name of what accompanies a figure: its "_ci" or "_real", by class for one by class."""
    whole, per_class, of = name.partition(PER_CLASS)
    return whole + ending + per_class + of


def shown(name: str, value: float, spread: float | None = None) -> str:
    """A figure's value in a table, with its standard deviation or interval."""
    if merit(name).percent:
        text = f"{100 * value:.1f}"
        return text if spread is None else f"{text} ± {100 * spread:.1f}"
    if spread is None or not math.isfinite(spread):
        return f"{value:.4g}"
    # As many decimals as the spread has with two significant digits.
    digits = max(0, 1 - _exponent(spread)) if spread > 0 else 4
    if digits > 8:
        return f"{value:.4g} ± {spread:.2g}"
    return f"{value:.{digits}f} ± {spread:.{digits}f}"


def _exponent(value: float) -> int:
    return int(f"{value:e}".rpartition("e")[2])


def title(name: str) -> str:
    """The head of a figure's column or panel."""
    found = merit(name)
    return f"{found.label} [%]" if found.percent else found.label


def lines(figures: Mapping[str, Any]) -> list[str]:
    """The main figures in words, a line each, real data's beside those of samples."""
    text = []
    for name, figure in figures.items():
        if isinstance(figure, Mapping) and "bits_per_dim" in figure:
            text += [f"{name}: {line}" for line in lines(figure)]
        elif isinstance(figure, str) and name.endswith("_note"):
            text.append(f"note: {figure}")
        elif isinstance(figure, float) and not name.endswith(ENDINGS):
            real, ci = figures.get(f"{name}_real"), figures.get(f"{name}_ci")
            spread = f" ± {ci:.2g}" if isinstance(ci, float) else ""
            beside = f" (real data {real:.4g})" if isinstance(real, float) else ""
            text.append(f"{name}: {figure:.4g}{spread}{beside}")
    return text
