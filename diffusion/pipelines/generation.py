"""Pictures from a pipeline: new ones, from a picture, repainted, enlarged or edited.

pipeline, params = load("stable-diffusion-v1-5/stable-diffusion-v1-5")
generate(pipeline, params, "a lighthouse at dusk", negative="blurry", steps=30)[0].save("x.png")
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from diffusion.conditioning import Conditioning
from diffusion.errors import field
from diffusion.evaluation.figures import to_uint8
from diffusion.pipelines import guidance as guidances
from diffusion.pipelines import picture_files, samplers, tasks
from diffusion.pipelines.codec import folded
from diffusion.pipelines.conditioners import Subject
from diffusion.pipelines.draw import Inputs
from diffusion.pipelines.drawer import Drawer
from diffusion.pipelines.guidance import Specs
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.sampling.sample import image_keys

EDITORS = {
    "StableDiffusionUpscalePipeline": "upscale",
    "StableDiffusionInstructPix2PixPipeline": "edit",
}
Picture = str | Path | Image.Image


@dataclass(frozen=True)
class Wish:
    """What is wanted of a pipeline, besides the subjects.

    Attributes:
      negative: what to steer away from; None: what stands for none.
      image: a picture to start from, to repaint, to enlarge or to edit.
      mask: white is painted anew.
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
      clip_skip: last layers of the text encoder to leave out.
      original, crop, aesthetic: SDXL's micro-conditioning: (height, width) of the training picture
        (empty: the picture's), (top, left) of where it was cropped, and the refiner's scores, to
        steer to and away from.
    """

    negative: Subject | None = None
    image: Picture | None = None
    mask: Picture | None = None
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
    clip_skip: int = 0
    original: tuple[int, int] | tuple[()] = ()
    crop: tuple[int, int] = (0, 0)
    aesthetic: tuple[float, float] = (6.0, 2.5)


class Generation:
    """What is to be made, checked before any weight is read.

    Attributes:
      pipeline: that makes it.
      task: "new", "from picture", "repaint", "upscale" or "edit".
      size: (height, width) of the pictures; for an upscaler, of the small ones.
      given: the picture and the mask, [H, W, C], by name.
      drawer: makes latents.
      notes: settings that have no effect.

    Args:
      pipeline: the model.
      subjects: the prompt or class of every picture.
      wish: how they are to be.
      refiner: a pipeline that takes SDXL's last steps.
      at: what errors say before the names of the sampler's fields: "config.sampler.".

    Raises:
      ValueError, FileNotFoundError: something does not fit; the message names it.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        subjects: Sequence[Subject],
        wish: Wish = Wish(),
        *,
        refiner: Pipeline | None = None,
        at: str = "",
    ):
        if not subjects:
            raise ValueError("nothing is wanted: expected at least one prompt, class or count")
        self.subjects, self.wish, self._refiner = list(subjects), wish, refiner
        self.task = _task(pipeline, wish)
        _check_subjects(pipeline, self.subjects)
        _check_sizes(pipeline, wish)
        self.size = _size(pipeline, wish, self.task)
        self.given = _pictures(pipeline, wish, self.size)
        strength = wish.strength if self.task in ("from picture", "repaint") else None
        if refiner is None:
            options = {"strength": strength, "at": at}
            sampler = samplers.make(pipeline, wish.solver, wish.grid, wish.steps, **options)
        else:
            sampler, last = self._shared(pipeline, refiner, at)
        corrector = samplers.make_corrector(wish.corrector, sampler, at)
        guided = guidances.make(
            pipeline,
            sampler,
            wish.guidance,
            negative=wish.negative,
            accelerations=wish.acceleration,
            corrected=corrector is not None,
            edits=self.task == "edit",
            at=at,
        )
        self.pipeline, self.notes = guided.pipeline, guided.notes
        options = {"batch_size": wish.batch_size, "seed": wish.seed, "unit": "picture"}
        if hasattr(pipeline.conditioner, "encoders"):
            options["condition"] = {"clip_skip": wish.clip_skip, "weighted": wish.weighted}
        elif wish.clip_skip or wish.weighted:
            raise ValueError("clip_skip and weighted are for prompts of pretrained text encoders")
        self.drawer = Drawer(
            self.pipeline,
            sampler,
            guided.chain,
            companions=guided.companions,
            acceleration=guided.acceleration,
            corrector=corrector,
            **options,
        )
        if refiner is not None:
            last_chain = guidances.make(refiner, last, wish.guidance, at=at).chain
            self._last = Drawer(refiner, last, last_chain, **options)

    @property
    def evaluations(self) -> int:
        """Of each picture, the refiner's included."""
        last = self._last.sampler.solver.evaluations if self._refiner else 0
        return self.drawer.sampler.solver.evaluations + last

    def pictures(
        self, params: Params, refined: Params | None = None
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(number, picture [H, W, C] in [-1, 1]) of each subject, batch by batch.

        ``refined`` are the refiner's parameters.
        """
        codec = self.pipeline.codec if self._refiner is None else self._refiner.codec
        weights = params if refined is None else refined

        def prepare(
            index: np.ndarray, keys: jax.Array, cond: Conditioning, null: Conditioning | None
        ) -> Inputs:
            return self._inputs(params, keys, cond, null)

        wish = self.wish
        parts = self.drawer.batches(params, self.subjects, wish.negative, prepare=prepare)
        for index, latents in parts:
            if self._refiner is not None:
                latents = self._refine(weights, index, latents)
            for i, image in zip(index, np.asarray(codec.decode(weights, latents))):
                yield int(i), image

    def _inputs(
        self, params: Params, keys: jax.Array, cond: Conditioning, null: Conditioning | None
    ) -> Inputs:
        pipeline = self.pipeline
        cond, null = self._micro(pipeline, cond, null)
        given = {name: np.stack([a] * len(keys)) for name, a in self.given.items()}
        if self.task == "new":
            return tasks.new(pipeline, cond, null, size=self.size)
        image = given["image"]
        if self.task == "from picture":
            return tasks.from_picture(pipeline, params, keys, cond, null, image)
        if self.task == "repaint":
            strength = {"strength": self.wish.strength}
            return tasks.repainted(
                pipeline, params, keys, cond, null, image, given["mask"], **strength
            )
        if self.task == "upscale":
            level = {"noise_level": self.wish.noise_level}
            return tasks.upscaled(pipeline, keys, cond, null, image, **level)
        return tasks.edited(pipeline, params, cond, null, image)

    def _refine(self, weights: Params, index: np.ndarray, latents: np.ndarray) -> np.ndarray:
        """What the refiner makes of a batch."""
        drawer, wish = self._last, self.wish
        keys = folded(image_keys(wish.seed, index), tasks.REFINER)
        subjects = [self.subjects[i] for i in index]
        cond, null = drawer.conditioning(weights, subjects, wish.negative)
        cond, null = self._micro(drawer.pipeline, cond, null)
        return drawer.batch(weights, keys, tasks.continued(cond, null, latents))

    def _micro(
        self, pipeline: Pipeline, cond: Conditioning, null: Conditioning | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """With SDXL's sizes, where the pipeline is one of SDXL."""
        if not getattr(pipeline.conditioner, "sdxl", False):
            return cond, null
        scored, wish = pipeline.options.get("requires_aesthetics_score"), self.wish
        sizes = {"original": wish.original or None, "crop": wish.crop}
        scores = wish.aesthetic if scored else (None, None)
        return tuple(
            tasks.micro_conditioning(c, self.size, aesthetic=score, **sizes)
            for c, score in zip((cond, null), scores)
        )

    def _shared(self, pipeline: Pipeline, refiner: Pipeline, at: str) -> tuple[Any, Any]:
        """The samplers of base model and refiner."""
        wish = self.wish
        if self.task != "new" or pipeline.scheduler is None:
            raise ValueError("a refiner takes the last steps of text to image with SDXL")
        if wish.solver != "auto" and not wish.solver[0].isupper():
            raise ValueError(
                f"{at}solver={wish.solver!r}: with a refiner, choose a class of diffusers"
            )
        named = "" if wish.solver == "auto" else wish.solver
        both = (samplers.scheduler(p, named, f"{at}solver") for p in (pipeline, refiner))
        return samplers.hand_over(*both, wish.steps or pipeline.defaults.steps, wish.hand_over)


def generate(
    pipeline: Pipeline,
    params: Params,
    prompt: Subject | Sequence[Subject] | None = None,
    *,
    negative: Subject | None = None,
    count: int = 1,
    steps: int = 0,
    guidance: float | Specs = "auto",
    size: tuple[int, int] = (0, 0),
    seed: int = 0,
    refiner: tuple[Pipeline, Params] | None = None,
    **wishes: Any,
) -> list[Image.Image]:
    """Pictures as PIL knows them.

    Args:
      pipeline, params: what ``load`` gives.
      prompt: a prompt, caption or class, or several; by default the model's own suggestions.
      negative: what to steer away from.
      count: pictures of each prompt.
      steps: of the sampler; 0: as many as the pipeline's.
      guidance: the scale of classifier-free guidance, or specs of a chain, ("cfg(7.5)", ...).
      size: (height, width) in pixels.
      seed: of all noise.
      refiner: SDXL's, for the last steps.
      wishes: other fields of ``Wish``: image, mask, strength, solver, grid, batch_size, ...

    Raises:
      ValueError, FileNotFoundError: something does not fit; the message names it.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if prompt is None:
        subjects: list[Subject] = list(pipeline.conditioner.suggestions) or [0]
    else:
        subjects = [prompt] if isinstance(prompt, (str, int)) else list(prompt)
    if isinstance(guidance, (int, float)):
        guidance = (f"cfg({guidance})",)
    wish = Wish(
        negative=negative, steps=steps, guidance=guidance, size=tuple(size), seed=seed, **wishes
    )
    other, refined = refiner if refiner is not None else (None, None)
    repeated = [subject for subject in subjects for _ in range(count)]
    generation = Generation(pipeline, repeated, wish, refiner=other)
    for note in generation.notes:
        warnings.warn(note, stacklevel=2)
    return [as_pil(picture) for _, picture in generation.pictures(params, refined)]


def as_pil(picture: np.ndarray) -> Image.Image:
    """[H, W, 1 or 3] in [-1, 1] as PIL's."""
    pixels = to_uint8(picture)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def _task(pipeline: Pipeline, wish: Wish) -> str:
    """What is to be done, checked against what is given."""
    if len(pipeline.shape) != 3:
        raise ValueError(
            f"this model makes no pictures: its examples have shape {pipeline.shape}. "
            "--mode=sample draws them"
        )
    task = EDITORS.get(pipeline.kind)
    if task is None:
        task = "new" if wish.image is None else "from picture"
        if wish.mask is not None or pipeline.extra_channels == pipeline.shape[-1] + 1:
            task = "repaint"
    takes = {"image": task != "new", "mask": task == "repaint"}
    for name, taken in takes.items():
        given = getattr(wish, name) is not None
        if taken and not given:
            raise ValueError(f"{name}: {pipeline.kind} ({task}) needs it")
        if given and not taken:
            raise ValueError(f"{name}: {pipeline.kind} ({task}) does not take it")
    return task


def _check_subjects(pipeline: Pipeline, subjects: Sequence[Subject]) -> None:
    conditioner = pipeline.conditioner
    if conditioner.subject == "text" and not any(subjects):
        raise ValueError("the prompt is empty: say what should be in the picture")
    for subject in dict.fromkeys(subjects):
        if conditioner.subject or subject != 0:
            conditioner.check(subject)


def _check_sizes(pipeline: Pipeline, wish: Wish) -> None:
    """Raises ValueError where SDXL's micro-conditioning is wrong or has no place."""
    usual = Wish()
    for name in ("original", "crop", "aesthetic"):
        value = getattr(wish, name)
        if len(value) != 2 and value != getattr(usual, name):
            raise ValueError(f"{name}={value} must be two numbers")
        if value != getattr(usual, name) and not getattr(pipeline.conditioner, "sdxl", False):
            raise ValueError(f"{name}={value} is for SDXL's pipelines; this is {pipeline.kind}")


def _size(pipeline: Pipeline, wish: Wish, task: str) -> tuple[int, int]:
    """(height, width) of the pictures that are made, or of the one that is upscaled."""
    size, unit = pipeline.size, pipeline.unit
    if hasattr(pipeline.image_network, "patch"):
        if wish.size not in ((0, 0), size):
            raise ValueError(f"size={wish.size}: this network makes {size} only")
        return size
    if task == "upscale":
        unit //= pipeline.codec.factor
    if wish.image is not None and pipeline.scheduler is not None:
        size = picture_files.fitting_size(wish.image, unit)
    size = (wish.size[0] or size[0], wish.size[1] or size[1])
    for name, side in zip(("height", "width"), size):
        if side < unit or side % unit:
            nearest = max(round(side / unit), 1) * unit
            raise ValueError(f"{name}={side} must be a multiple of {unit}; nearest: {nearest}")
    return size


def _pictures(pipeline: Pipeline, wish: Wish, size: tuple[int, int]) -> dict[str, np.ndarray]:
    given = {}
    if wish.image is not None:
        with field(f"image={wish.image!r}"):
            given["image"] = picture_files.read_image(wish.image, size, pipeline.channels)
    if wish.mask is not None:
        with field(f"mask={wish.mask!r}"):
            given["mask"] = picture_files.read_mask(wish.mask, size)
    return given
