"""What --mode=generate is asked for, checked before any weight is read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import specs
from diffusion.config import acceleration, guidance
from diffusion.config import sampler as samplers
from diffusion.config.errors import field, wrong_types
from diffusion.pipelines import memory, picture_files, tasks
from diffusion.pipelines.from_pretrained import Opened, open_pipeline
from diffusion.pipelines.from_single_file import open_checkpoint
from diffusion.pipelines.pipeline import Pipeline
from diffusion.pipelines.tokenizers import clip_tokenizer, load_tokenizer
from diffusion.pretrained import hub, schedulers
from diffusion.pretrained.schedulers import Sampler, from_diffusers
from diffusion.sampling import grids
from diffusion.sampling.guidance.chain import Chain

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
KINDS = {
    "StableDiffusionUpscalePipeline": "upscale",
    "StableDiffusionInstructPix2PixPipeline": "instruct",
    "DiTPipeline": "class_to_image",
}
CLIP = "openai/clip-vit-large-patch14"
TIGHT = 1.6  # what a network needs may be so many times the estimate


@dataclass(frozen=True)
class Request:
    """What is to be made.

    Attributes:
      opened: the pipeline, without weights.
      task: the function of ``pipelines.tasks`` that does it.
      size: (height, width) of the pictures; for an upscaler, of the small ones.
      texts: the prompt of every picture; empty for classes.
      labels: the class of every picture; empty for texts.
      sampler: what steps to take.
      guidance: its links.
      refiner, last: the pipeline that takes the last steps, and these; or None.
      given: "image" and "mask", where there are.
      batch_size: pictures at a time.
    """

    opened: Opened
    task: str
    size: tuple[int, int]
    texts: list[str]
    labels: np.ndarray
    sampler: Sampler
    guidance: Chain
    refiner: Opened | None
    last: Sampler | None
    given: dict[str, np.ndarray]
    batch_size: int

    @property
    def count(self) -> int:
        """Of pictures."""
        return len(self.texts) or len(self.labels)

    @property
    def evaluations(self) -> int:
        """Of each picture, the refiner's included."""
        return self.sampler.solver.evaluations + (self.last.solver.evaluations if self.last else 0)


def read(config: ConfigDict) -> Request:
    """The request of a config like ``configs/stable_diffusion.py``.

    Raises:
      ValueError, FileNotFoundError: a field that does not fit, which the message names.
    """
    dtype = _dtype(config)
    opened = _open("model", config, dtype)
    task = _task(config, opened.pipeline)
    texts, labels = _subjects(config, task)
    size = _size(config, opened.pipeline, task)
    refiner = _open("refiner", config, dtype) if config.refiner else None
    sampler, last = _samplers(config, opened.pipeline, task, refiner)
    opened, refiner = _accelerate(config, task, opened, refiner, sampler)
    batch_size = min(config.sampler.batch_size, len(texts) or len(labels))
    made = tuple(opened.pipeline.autoencoder.factor * side for side in size)
    made = made if task == "upscale" else size
    _check_memory(config, [o for o in (opened, refiner) if o], made, batch_size)
    given = _pictures(config, size)
    links = _guidance(config, task, sampler)
    return Request(
        opened, task, size, texts, labels, sampler, links, refiner, last, given, batch_size
    )


def _dtype(config: ConfigDict) -> Any:
    if config.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if config.dtype not in DTYPES:
        raise specs.unknown("config.dtype", config.dtype, ("auto", *DTYPES))
    return DTYPES[config.dtype]


def _open(name: str, config: ConfigDict, dtype: Any) -> Opened:
    where = config[name]
    if not where:
        raise ValueError(
            f"config.{name} must name a diffusers folder, a safetensors file or a hub id"
        )
    common = {"dtype": dtype, "tile": config.tile}
    with field(f"config.{name}={where!r}"):
        if Path(where).is_file():
            prediction = config.prediction_type or None
            tokenizer = partial(_clip_tokenizer, config.tokenizer)
            return open_checkpoint(where, tokenizer, prediction_type=prediction, **common)
        revision, variant = config.revision or None, config.variant or None
        return open_pipeline(where, revision=revision, variant=variant, **common)


def _clip_tokenizer(where: str, pad: str) -> Any:
    """CLIP's, from a folder, OpenAI's merges file or the hub."""
    with field(f"config.tokenizer={where!r}"):
        if where and Path(where).is_file():
            return clip_tokenizer(where, pad=pad)
        try:
            tokenizer = load_tokenizer(hub.locate(where or CLIP, weights=False))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"a single file holds no tokenizer: name CLIP's folder, or the path of "
                f"bpe_simple_vocab_16e6.txt.gz ({error})"
            ) from None
    tokenizer.pad_token = pad
    return tokenizer


def _task(config: ConfigDict, pipeline: Pipeline) -> str:
    """What is to be done, checked against the fields that are set."""
    task = KINDS.get(pipeline.kind)
    if task is None:
        task = "text_to_image" if not config.image else "image_to_image"
        if (
            config.mask
            or pipeline.network.in_channels == 2 * pipeline.autoencoder.latent_channels + 1
        ):
            task = "inpaint"
    takes = {
        "image": task not in ("text_to_image", "class_to_image"),
        "mask": task == "inpaint",
        "refiner": task == "text_to_image" and pipeline.encoders[1:],
        "labels": task == "class_to_image",
    }
    for name in ("image", "mask", "labels"):
        if takes[name] and not config[name]:
            raise ValueError(f"config.{name}: {pipeline.kind} ({task}) needs it")
    for name, taken in takes.items():
        if config[name] and not taken:
            raise ValueError(f"config.{name}: {pipeline.kind} ({task}) does not take it")
    return task


def _subjects(config: ConfigDict, task: str) -> tuple[list[str], np.ndarray]:
    """The prompt of every picture, or its class."""
    if config.count < 1 or config.sampler.batch_size < 1:
        raise ValueError(
            f"config.count={config.count} and config.sampler.batch_size="
            f"{config.sampler.batch_size} must be at least 1"
        )
    for name in ("crop", "aesthetic", *(["original"] if config.original else [])):
        if len(config[name]) != 2:
            raise ValueError(f"config.{name}={config[name]} must be two numbers")
    if task == "class_to_image":
        if config.prompt or config.prompts:
            raise ValueError("config.prompt: this model takes config.labels, no text")
        return [], np.repeat(np.asarray(config.labels, np.int32).reshape(-1), config.count)
    prompts = [config.prompt]
    if config.prompts:
        if config.prompt:
            raise ValueError("config.prompt and config.prompts: give one of the two")
        if not Path(config.prompts).is_file():
            raise FileNotFoundError(f"config.prompts={config.prompts!r}: there is no such file")
        lines = Path(config.prompts).read_text().splitlines()
        prompts = [line.strip() for line in lines if line.strip()]
    if not any(prompts):
        raise ValueError("config.prompt is empty: say what should be in the picture")
    return [prompt for prompt in prompts for _ in range(config.count)], np.zeros(0, np.int32)


def _size(config: ConfigDict, pipeline: Pipeline, task: str) -> tuple[int, int]:
    """(height, width) of the pictures that are made, or of the one that is upscaled."""
    factor = pipeline.autoencoder.factor
    h, w, _ = pipeline.latent_shape()
    size = (h * factor, w * factor)
    if task == "class_to_image":
        if (config.height, config.width) not in ((0, 0), size):
            raise ValueError(f"config.height, config.width: this network makes {size} only")
        return size
    unit = factor * 2 ** (len(pipeline.network.widths) - 1)
    if task == "upscale":
        unit //= factor
    if config.image:
        with field(f"config.image={config.image!r}"):
            size = picture_files.fitting_size(config.image, unit)
    size = (config.height or size[0], config.width or size[1])
    for name, side in zip(("height", "width"), size):
        if side < unit or side % unit:
            nearest = max(round(side / unit), 1) * unit
            raise ValueError(
                f"config.{name}={side} must be a multiple of {unit} pixels; nearest: {nearest}"
            )
    return size


def _samplers(
    config: ConfigDict, pipeline: Pipeline, task: str, refiner: Opened | None
) -> tuple[Sampler, Sampler | None]:
    """The pipeline's sampler, and the refiner's."""
    c = config.sampler
    for name in ("steps",):
        if c[name] < 1:
            raise ValueError(f"config.sampler.{name}={c[name]} must be at least 1")
    own, strength = pipeline.scheduler, None
    if task in ("image_to_image", "inpaint"):
        strength = config.strength
        if not 0 < strength <= 1:
            raise ValueError(f"config.strength={strength} must lie in (0, 1]")
    if c.solver and not c.solver[0].isupper():
        if refiner:
            raise ValueError(
                f"config.sampler.solver={c.solver!r}: with a refiner, choose a class of diffusers"
            )
        return _own_solver(config, own, strength), None
    if c.solver:
        name, options = _scheduler(c.solver)
        own = {**own, **options, "_class_name": name}
    called = "config.sampler.solver" if c.solver else "config.model's scheduler"
    with field(called), wrong_types():
        if refiner is None:
            return from_diffusers(own, c.steps, strength=strength), None
        other = refiner.pipeline.scheduler
        other = {**other, **options, "_class_name": name} if c.solver else other
        return tasks.hand_over(own, other, c.steps, c.hand_over)


def _accelerate(
    config: ConfigDict, task: str, opened: Opened, refiner: Opened | None, sampler: Sampler
) -> tuple[Opened, Opened | None]:
    """The pipelines with the config's acceleration."""
    networks = {"": opened.pipeline.network}
    networks |= {"refiner": refiner.pipeline.network} if refiner else {}
    made = acceleration.make(config, networks, sampler.solver.evaluations)
    if made.guidance is not None and task == "instruct":
        raise ValueError(f"{acceleration.FIELD}: guidance by text and picture takes no cache")

    def accelerated(opened: Opened) -> Opened:
        return replace(opened, pipeline=replace(opened.pipeline, acceleration=made))

    return accelerated(opened), refiner and accelerated(refiner)


def _guidance(config: ConfigDict, task: str, sampler: Sampler) -> Chain:
    """The links of the config's guidance, if they suit the task."""
    chain = guidance.read(config)
    with field(f"{guidance.FIELD}={config.sampler.guidance!r}"):
        for link in chain:
            if link.network or link.name == "perturbed_attention":
                raise ValueError(f"{link.name} is for runs that were trained here")
            if (link.name == "instruct") > (task == "instruct"):
                raise ValueError("instruct is for networks that edit pictures (InstructPix2Pix)")
            link.check_levels(sampler.solver.level, sampler.prediction)
        if task == "instruct" and not any(link.name == "instruct" for link in chain):
            raise ValueError("this network follows text and picture: expected instruct(7.5, 1.5)")
    return chain


def _scheduler(text: str) -> tuple[str, dict[str, Any]]:
    """A class of diffusers and its fields: "EulerDiscreteScheduler(use_karras_sigmas=True)"."""
    known = dict.fromkeys(schedulers.CLASSES, lambda: None)
    name, positional, options = specs.parse(text, known, "config.sampler.solver")
    if positional:
        raise ValueError(f"config.sampler.solver={text!r}: options need names")
    return name, options


def _own_solver(config: ConfigDict, scheduler: Any, strength: float | None) -> Sampler:
    """A solver of this project on the schedule that the network was trained on."""
    trained = from_diffusers(scheduler, config.sampler.steps)
    grid = samplers.make_grid(config, trained)
    if strength is not None:
        with field(f"config.strength={strength}"):
            grid = grids.partial(grid, strength)
    solver = samplers.make_solver(config, trained, grid=grid)
    return trained._replace(
        grid=grid,
        solver=solver,
        timesteps=np.asarray(trained.c_noise(solver.level)),
        transform=lambda denoise: denoise,
        scales=(1.0, 1.0),
    )


def _pictures(config: ConfigDict, size: tuple[int, int]) -> dict[str, np.ndarray]:
    given = {}
    if config.image:
        with field(f"config.image={config.image!r}"):
            given["image"] = picture_files.read_image(config.image, size)
    if config.mask:
        with field(f"config.mask={config.mask!r}"):
            given["mask"] = picture_files.read_mask(config.mask, size)
    return given


def _check_memory(
    config: ConfigDict, opened: list[Opened], size: tuple[int, int], batch_size: int
) -> None:
    """Says what will not fit, or may not, before weights are read."""
    free = memory.available(jax.local_devices()[0])
    if free is None:
        return
    weights = sum(o.nbytes for o in opened)
    share = -(-batch_size // jax.local_device_count())
    working = max(o.working_bytes(size, share) for o in opened)
    gib = 2**30
    told = (
        f"weights take {weights / gib:.1f} GiB and the computation about {working / gib:.1f}, "
        f"of {free / gib:.1f} GiB that are free"
    )
    knobs = "a smaller config.sampler.batch_size, config.height and width, or config.tile=512 helps"
    if config.dtype != "bfloat16" and opened[0].dtype == jnp.float32:
        knobs += ", and so does config.dtype=bfloat16"
    if weights + working > free:
        raise ValueError(f"not enough memory: {told}; {knobs}")
    if weights + TIGHT * working > free:
        print(f"note: memory may not suffice: {told}; if so, {knobs}")
