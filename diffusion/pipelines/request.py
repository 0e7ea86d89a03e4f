"""Requests: how pictures are to be made, and their checks before any weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from diffusion.errors import field
from diffusion.evaluation.views import VIEWS
from diffusion.pipelines import picture_files
from diffusion.pipelines.conditioners import Subject
from diffusion.pipelines.guidance import Specs
from diffusion.pipelines.picture_files import Picture
from diffusion.pipelines.pipeline import Pipeline


@dataclass(frozen=True)
class Request:
    """How pictures are to be made, besides their subjects.

    Attributes:
      negative: what to steer away from; None: what stands for none.
      image: a picture to start from, to repaint, to enlarge or to edit.
      mask: white is painted anew.
      fit: of a picture of other proportions: "crop" or "pad".
      paste: whether what a mask leaves black is the given picture's, to the pixel.
      strength: of image to image: how much of the picture is made anew, 0 to 1 (of a mask: 1 starts
        from noise).
      noise_level: of the noise that is added to an upscaler's picture.
      size: (height, width) in pixels; 0: the trained size, or of a pretrained model the picture's.
      solver, grid, steps, corrector: see ``samplers.make`` and ``make_corrector``.
      guidance, acceleration: see ``guidance.make``.
      hand_over: share of the schedule before a refiner.
      seed: of all noise; picture i of a seed is the same in any batch.
      batch_size: pictures at a time.
      weighted: read (word:1.3), ((word)) and [word] as weights.
      emphasis: what such weights leave as it was: none, mean, norm or auto (``emphasis.weigh``).
      clip_skip: last layers of the text encoder to leave out.
      original, crop, aesthetic: SDXL's micro-conditioning: (height, width) of the training picture
        (empty: the picture's), (top, left) of where it was cropped, and the refiner's scores, to
        steer to and away from.
      control: specs of ``control.CHOICES``: what ControlNets and T2I-Adapters follow.
      image_prompts: specs of ``image_prompts.CHOICES``: what IP-Adapters take over.
    """

    negative: Subject | None = None
    image: Picture | None = None
    mask: Picture | None = None
    fit: str = "crop"
    paste: bool = True
    strength: float = 0.8
    noise_level: int = 20
    size: tuple[int, int] = (0, 0)
    solver: str = "auto"
    grid: str = "auto"
    steps: int = 0
    corrector: str = ""
    guidance: Specs = "auto"
    acceleration: Specs = ()
    hand_over: float = 0.8
    seed: int = 0
    batch_size: int = 1
    weighted: bool = False
    emphasis: str = "auto"
    clip_skip: int = 0
    original: tuple[int, int] | tuple[()] = ()
    crop: tuple[int, int] = (0, 0)
    aesthetic: tuple[float, float] = (6.0, 2.5)
    control: Specs = ()
    image_prompts: Specs = ()


def task(pipeline: Pipeline, request: Request) -> str:
    """What is to be done, checked against what is given."""
    if pipeline.view is not VIEWS["images"]:
        raise ValueError(
            f"this model makes no pictures: its examples have shape {pipeline.shape}. "
            "--mode=sample draws them"
        )
    task = "new" if request.image is None else "from picture"
    if pipeline.edits:
        task = "edit"
    elif pipeline.low_res_scheduler is not None:
        task = "upscale"
    elif request.mask is not None or pipeline.extra_channels == pipeline.shape[-1] + 1:
        task = "repaint"
    takes = {"image": task != "new", "mask": task == "repaint"}
    for name, taken in takes.items():
        given = getattr(request, name) is not None
        if taken and not given:
            raise ValueError(f"{name}: {pipeline.kind} ({task}) needs it")
        if given and not taken:
            raise ValueError(f"{name}: {pipeline.kind} ({task}) does not take it")
    if request.fit != "crop" and request.image is None:
        raise ValueError(f"fit={request.fit!r} is for a picture, and no image is given")
    if not request.paste and task != "repaint":
        raise ValueError(f"paste={request.paste} is for a mask; this is {task}")
    return task


def check_subjects(pipeline: Pipeline, subjects: Sequence[Subject]) -> None:
    conditioner = pipeline.conditioner
    for subject in dict.fromkeys(subjects):
        if conditioner.subject or subject != 0:
            conditioner.check(subject)


def check_effects(
    pipeline: Pipeline, request: Request, task: str, refiner: Pipeline | None
) -> None:
    """Raises ValueError for what is not left as it is by default and cannot act."""
    prompts = hasattr(pipeline.conditioner, "encoders")
    sdxl, usual = getattr(pipeline.conditioner, "sdxl", False), Request()
    scored = any(p and p.options.get("requires_aesthetics_score") for p in (pipeline, refiner))
    acts = {
        "strength": (task in ("from picture", "repaint"), "a picture to start from or to repaint"),
        "noise_level": (task == "upscale", "an upscaler's picture"),
        "hand_over": (refiner is not None, "a refiner (config.model.refiner)"),
        "weighted": (prompts, "prompts of pretrained text encoders"),
        "emphasis": (request.weighted, "prompts with weights (weighted=True)"),
        "clip_skip": (prompts, "prompts of pretrained text encoders"),
        "original": (sdxl, "SDXL's pipelines"),
        "crop": (sdxl, "SDXL's pipelines"),
        "aesthetic": (scored, "SDXL's refiner"),
    }
    for name, (acting, place) in acts.items():
        value = getattr(request, name)
        if value != getattr(usual, name) and not acting:
            raise ValueError(
                f"{name}={value!r} has no effect: it is for {place}; this is {pipeline.kind} "
                f"({task})"
            )
    if request.negative is not None:
        with field(f"negative={request.negative!r}"):
            pipeline.conditioner.check(request.negative)
    for name in ("original", "crop", "aesthetic"):
        value = getattr(request, name)
        if len(value) != 2 and value != getattr(usual, name):
            raise ValueError(f"{name}={value} must be two numbers")


def size(pipeline: Pipeline, request: Request, task: str) -> tuple[int, int]:
    """(height, width) of the pictures that are made, or of the one that is upscaled."""
    size, unit = pipeline.size, pipeline.unit
    if hasattr(pipeline.image_network, "patch"):
        if request.size not in ((0, 0), size):
            raise ValueError(f"size={request.size}: this network makes {size} only")
        return size
    if task == "upscale":
        unit //= pipeline.codec.factor
    if request.image is not None and pipeline.scheduler is not None:
        size = picture_files.fitting_size(request.image, unit)
    size = (request.size[0] or size[0], request.size[1] or size[1])
    for name, side in zip(("height", "width"), size):
        if side < unit or side % unit:
            nearest = max(round(side / unit), 1) * unit
            raise ValueError(f"{name}={side} must be a multiple of {unit}; nearest: {nearest}")
    return size


def pictures(pipeline: Pipeline, request: Request, size: tuple[int, int]) -> dict[str, np.ndarray]:
    given = {}
    if request.image is not None and request.mask is not None:
        sides = [picture_files.fitting_size(p, 1) for p in (request.image, request.mask)]
        (h, w), (mask_h, mask_w) = sides
        if abs(h * mask_w - w * mask_h) > 0.02 * w * mask_h:
            raise ValueError(
                f"mask: it has {mask_h} x {mask_w} pixels and the picture {h} x {w}, other "
                "proportions, so that they do not lie on each other"
            )
    if request.image is not None:
        with field(f"image={request.image!r}"):
            given["image"] = picture_files.read_image(
                request.image, size, pipeline.channels, request.fit
            )
    if request.mask is not None:
        with field(f"mask={request.mask!r}"):
            given["mask"] = picture_files.read_mask(request.mask, size, request.fit)
    return given
