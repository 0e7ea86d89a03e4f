"""Pictures from a pipeline: new ones, from a picture, repainted, enlarged or edited.

pipeline, params = load("stable-diffusion-v1-5/stable-diffusion-v1-5")
generate(pipeline, params, "a lighthouse at dusk", negative="blurry", steps=30)[0].save("x.png")
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from PIL import Image
from scipy import ndimage

from diffusion.conditioning import Conditioning
from diffusion.evaluation.figures import to_uint8
from diffusion.pipelines import control, image_prompts, samplers, tasks
from diffusion.pipelines import guidance as guidances
from diffusion.pipelines import request as requests
from diffusion.pipelines.codec import check_finite, folded
from diffusion.pipelines.conditioners import Subject
from diffusion.pipelines.draw import Inputs
from diffusion.pipelines.drawer import Drawer
from diffusion.pipelines.guidance import Specs
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pipelines.request import Request
from diffusion.sampling.sample import image_keys


class Generation:
    """What is to be made, checked before any weight is read.

    Attributes:
      pipeline: that makes it.
      task: "new", "from picture", "repaint", "upscale" or "edit".
      size: (height, width) of the pictures; for an upscaler, of the small ones.
      given: the picture and the mask, [H, W, C], by name.
      drawer: makes latents.
      extensions: what is put around the network.
      notes: settings that have no effect.

    Args:
      pipeline: the model.
      subjects: the prompt or class of every picture.
      request: how they are to be.
      refiner: a pipeline that takes SDXL's last steps.
      at: what errors say before the names of the sampler's fields: "config.sampler.".

    Raises:
      ValueError, FileNotFoundError: something does not fit; the message names it.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        subjects: Sequence[Subject],
        request: Request,
        *,
        refiner: Pipeline | None = None,
        at: str = "",
    ):
        if not subjects:
            raise ValueError("no subjects: expected at least one prompt or class")
        self.subjects, self.request, self._refiner = list(subjects), request, refiner
        self.task = requests.task(pipeline, request)
        requests.check_subjects(pipeline, self.subjects)
        requests.check_effects(pipeline, request, self.task, refiner)
        self.size = requests.size(pipeline, request, self.task)
        self.given = requests.pictures(pipeline, request, self.size)
        strength = request.strength if self.task in ("from picture", "repaint") else None
        if refiner is None:
            options = {"strength": strength, "at": at}
            sampler = samplers.make(
                pipeline, request.solver, request.grid, request.steps, **options
            )
        else:
            sampler, last = self._shared(pipeline, refiner, at)
        self.extensions = (
            *control.make(pipeline, sampler, request.control, self.size, self.given),
            *image_prompts.make(pipeline, sampler, request.image_prompts, self.size),
        )
        for extension in self.extensions:
            pipeline = extension.pipeline(pipeline)
        corrector = samplers.make_corrector(request.corrector, sampler, at)
        guided = guidances.make(
            pipeline,
            sampler,
            request.guidance,
            negative=request.negative,
            accelerations=request.acceleration,
            corrected=corrector is not None,
            at=at,
        )
        self.pipeline, self.notes = guided.pipeline, guided.notes
        options = {"batch_size": request.batch_size, "seed": request.seed, "unit": "picture"}
        if hasattr(pipeline.conditioner, "encoders"):
            names = ("clip_skip", "weighted", "emphasis")
            options["condition"] = {name: getattr(request, name) for name in names}
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
            last_chain = guidances.make(refiner, last, request.guidance, at=at).chain
            self._last = Drawer(refiner, last, last_chain, **options)

    @property
    def evaluations(self) -> int:
        """Of each picture, the refiner's included."""
        last = self._last.sampler.solver.evaluations if self._refiner else 0
        return self.drawer.sampler.solver.evaluations + last

    def pictures(
        self, params: Params, refined: Params | None = None, *, first: int = 0
    ) -> Iterator[tuple[int, np.ndarray]]:
        """(number, picture [H, W, C] in [-1, 1]) of each subject, batch by batch.

        ``refined`` are the refiner's parameters, ``first`` is the number of the first picture.
        """
        codec = self.pipeline.codec if self._refiner is None else self._refiner.codec
        weights = params if refined is None else refined
        for extension in self.extensions:
            params = extension.load(params)

        def prepare(
            index: np.ndarray, keys: jax.Array, cond: Conditioning, null: Conditioning | None
        ) -> Inputs:
            return self._inputs(params, keys, cond, null)

        options = {"prepare": prepare, "first": first}
        parts = self.drawer.batches(params, self.subjects, self.request.negative, **options)
        for index, latents in parts:
            if self._refiner is not None:
                own = [self.subjects[i - first] for i in index]
                latents = self._refine(weights, index, own, latents)
            images = np.asarray(codec.decode(weights, latents, index))
            for i, image in zip(index, images):
                yield int(i), self._pasted(image)

    def _pasted(self, image: np.ndarray) -> np.ndarray:
        """The picture with what the mask leaves black as it was given.

        The edge is feathered within what is painted, over the pixels that share a latent.
        """
        if self.task != "repaint" or not self.request.paste:
            return image
        mask = self.given["mask"]
        if not mask.all():
            inside = ndimage.distance_transform_edt(mask[..., 0])[..., None]
            width = min(max(self.pipeline.codec.factor / 2, 1), inside.max())
            mask = np.clip(inside / width, 0, 1).astype(np.float32)
        return mask * image + (1 - mask) * self.given["image"]

    def _inputs(
        self, params: Params, keys: jax.Array, cond: Conditioning, null: Conditioning | None
    ) -> Inputs:
        pipeline = self.pipeline
        cond, null = self._micro(pipeline, cond, null)
        for extension in self.extensions:
            cond, null = extension.condition(params, keys, cond, null)
        given = {name: np.stack([a] * len(keys)) for name, a in self.given.items()}
        if self.task == "new":
            return tasks.new(pipeline, cond, null, size=self.size)
        image = given["image"]
        if self.task == "from picture":
            return tasks.from_picture(pipeline, params, keys, cond, null, image)
        if self.task == "repaint":
            strength = {"strength": self.request.strength}
            return tasks.repainted(
                pipeline, params, keys, cond, null, image, given["mask"], **strength
            )
        if self.task == "upscale":
            level = {"noise_level": self.request.noise_level}
            return tasks.upscaled(pipeline, keys, cond, null, image, **level)
        return tasks.edited(pipeline, params, cond, null, image)

    def _refine(
        self, weights: Params, index: np.ndarray, subjects: Sequence[Subject], latents: np.ndarray
    ) -> np.ndarray:
        """What the refiner makes of a batch."""
        drawer, request = self._last, self.request
        keys = folded(image_keys(request.seed, index), tasks.REFINER)
        cond, null = drawer.conditioning(weights, subjects, request.negative)
        cond, null = self._micro(drawer.pipeline, cond, null)
        x = drawer.batch(weights, keys, tasks.continued(cond, null, latents))
        check_finite(x, "the refiner gave", index)
        return x

    def _micro(
        self, pipeline: Pipeline, cond: Conditioning, null: Conditioning | None
    ) -> tuple[Conditioning, Conditioning | None]:
        """With SDXL's sizes, where the pipeline is one of SDXL."""
        if not getattr(pipeline.conditioner, "sdxl", False):
            return cond, null
        scored, request = pipeline.options.get("requires_aesthetics_score"), self.request
        sizes = {"original": request.original or None, "crop": request.crop}
        scores = request.aesthetic if scored else (None, None)
        return tuple(
            tasks.micro_conditioning(c, self.size, aesthetic=score, **sizes)
            for c, score in zip((cond, null), scores)
        )

    def _shared(self, pipeline: Pipeline, refiner: Pipeline, at: str) -> tuple[Any, Any]:
        """The samplers of base model and refiner."""
        request = self.request
        if self.task != "new" or pipeline.scheduler is None:
            raise ValueError("a refiner takes the last steps of text to image with SDXL")
        if pipeline.few_steps is not None:
            few = pipeline.few_steps.name
            raise ValueError(f"a refiner takes the last of many steps, and the model is {few}")
        if request.solver != "auto" and not request.solver[0].isupper():
            raise ValueError(
                f"{at}solver={request.solver!r}: with a refiner, choose a class of diffusers"
            )
        if request.grid != "auto":
            raise ValueError(f"{at}grid={request.grid!r}: a refiner's scheduler has its own grid")
        named = "" if request.solver == "auto" else request.solver
        both = (samplers.scheduler(p, named, f"{at}solver") for p in (pipeline, refiner))
        return samplers.hand_over(
            *both, request.steps or pipeline.defaults.steps, request.hand_over, at
        )


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
    **options: Any,
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
      options: other fields of ``Request``: image, mask, strength, solver, grid, batch_size, ...

    Raises:
      ValueError, FileNotFoundError: something does not fit; the message names it.
    """
    if count < 1:
        raise ValueError(f"count={count} must be at least 1")
    if prompt is None:
        subjects: list[Subject] = list(pipeline.conditioner.suggestions) or [0]
    else:
        subjects = [prompt] if isinstance(prompt, (str, int, np.integer)) else list(prompt)
    if isinstance(guidance, (int, float)):
        guidance = (f"cfg({guidance})",)
    request = Request(
        negative=negative, steps=steps, guidance=guidance, size=tuple(size), seed=seed, **options
    )
    other, refined = refiner if refiner is not None else (None, None)
    repeated = [subject for subject in subjects for _ in range(count)]
    generation = Generation(pipeline, repeated, request, refiner=other)
    for note in generation.notes:
        warnings.warn(note, stacklevel=2)
    return [as_pil(picture) for _, picture in generation.pictures(params, refined)]


def as_pil(picture: np.ndarray) -> Image.Image:
    """[H, W, 1 or 3] in [-1, 1] as PIL's."""
    pixels = to_uint8(picture)
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
