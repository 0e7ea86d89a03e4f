"""Which fields of ``model``, ``sampler``, ``samples`` and beside them act in which mode.

What depends on the model is checked where it is opened (``pipelines.open_any``) and where what is
to be made is known (``pipelines.request``).
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

JUDGING = ("sample", "evaluate", "sweep", "learn", "generate")
DRAWING = ("train", *JUDGING)
GENERATING = "image mask fit paste strength noise_level height width weighted emphasis clip_skip"
ACTING = {
    **{
        f"samples.{name}": ("generate",) for name in f"{GENERATING} original crop aesthetic".split()
    },
    "model.refiner": ("generate",),
    "sampler.hand_over": ("generate",),
    "samples.gif": ("sample",),
    "sampler.preview_every": ("sample",),
    "samples.columns": ("train", "sample"),
    "samples.count": ("sample", "generate"),
    "sampler.steps": ("train", "sample", "evaluate", "generate", "cache"),
    "sampler.corrector": ("train", "sample", "evaluate", "sweep", "generate", "cache"),
    "sampler.batch_size": ("train", "sample", "evaluate", "sweep", "generate", "cache"),
    **{f"evaluation.{name}": ("evaluate",) for name in ("keep", "part")},
    "evaluation.samples": ("evaluate", "reference"),
    "reference.*": ("reference",),
    "compare.*": ("compare",),
    "sampler.*": (*DRAWING, "cache"),  # of a subject's class
    "samples.*": DRAWING,
    "model.path": (*DRAWING, "profile", "cache"),
    **{f"model.{name}": JUDGING for name in ["revision", "variant", "prediction_type"]},
    **{f"model.{name}": JUDGING for name in ["tokenizer", "vae", "network", "family", "tile"]},
    "adapters": JUDGING,
    "control": ("generate",),
    "image_prompts": ("generate",),
}
"""Pattern -> modes; a field's first pattern counts."""
BUILT = ("name", "unet", "dit", "mlp", "autoencoder", "text", "remat")
"""Fields of ``model`` that describe a network which is built."""


def check(mode: str, given: Iterable[str]) -> None:
    """Raises ValueError for a field that was given, "sampler.steps", and cannot act in a mode."""
    given = set(given)
    for name in sorted(given):
        modes = next((m for p, m in ACTING.items() if fnmatchcase(name, p)), None)
        if modes is not None and mode not in modes:
            raise ValueError(
                f"config.{name} has no effect in --mode={mode}; it is for {', '.join(modes)}"
            )
        section, _, field = name.partition(".")
        if section in ("model", "sampler", "samples", "adapters") and "evaluation.samples" in given:
            raise ValueError(
                f"config.{name} has no effect: config.evaluation.samples are there, and nothing is "
                "drawn"
            )
        if mode == "compare" and section != "compare":
            raise ValueError(f"config.{name} has no effect in --mode=compare, which draws nothing")
        built = section == "model" and field.partition(".")[0] in BUILT
        if built and mode in JUDGING and "model.path" in given:
            raise ValueError(
                f"config.{name} has no effect: it describes a network that is built, and "
                "config.model.path names one that there is"
            )
