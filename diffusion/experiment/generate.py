"""--mode=generate: pictures from a pretrained pipeline."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion import specs
from diffusion.conditioning import Conditioning
from diffusion.evaluation import figures
from diffusion.experiment import sampler as samplers
from diffusion.experiment.fields import field, wrong_types
from diffusion.pipelines import images as pictures
from diffusion.pipelines import memory, tasks
from diffusion.pipelines.loading import Opened, open_pipeline
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pipelines.prompts import encode_prompts
from diffusion.pretrained import schedulers
from diffusion.pretrained.schedulers import Sampler, from_diffusers
from diffusion.sampling import grids
from diffusion.sampling.progress import Monitor
from diffusion.sampling.sample import image_keys

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
KINDS = {
    "StableDiffusionUpscalePipeline": "upscale",
    "StableDiffusionInstructPix2PixPipeline": "instruct",
    "DiTPipeline": "class_to_image",
}
TIGHT = 1.6  # what a network needs may be so many times the estimate


def generate(config: ConfigDict, workdir: str | None) -> None:
    """Writes pictures as ``configs/stable_diffusion.py`` describes.

    Leaves in ``workdir`` (default "generated") a PNG per picture, named after what number of the
    folder it is, with all settings as text chunks, and grid.png where there are several.

    Raises:
      ValueError, FileNotFoundError: a field that does not fit, before weights are read.
    """
    if "prompt" not in config or "model" not in config:
        raise ValueError("--mode=generate takes a config like configs/stable_diffusion.py")
    began = time.perf_counter()
    folder = Path(workdir or "generated")
    dtype = _dtype(config)
    opened = _open("model", config.model, config, dtype)
    task = _task(config, opened.pipeline)
    texts, labels = _subjects(config, task)
    size = _size(config, opened.pipeline, task)
    refiner = _open("refiner", config.refiner, config, dtype) if config.refiner else None
    sampler, last = _samplers(config, opened.pipeline, task, refiner)
    count = len(labels if task == "class_to_image" else texts)
    batch_size = min(config.sampler.batch_size, count)
    _check_memory(config, [o for o in (opened, refiner) if o], size, batch_size)
    given = _pictures(config, opened.pipeline, task, size)

    print(f"{config.model}: {opened.pipeline.kind}, {task.replace('_', ' ')}, {count} x {size}")
    params = opened.load(progress=sys.stderr.isatty())
    refined = refiner.load(progress=sys.stderr.isatty()) if refiner else None
    folder.mkdir(parents=True, exist_ok=True)
    first = _next_number(folder)
    made = []
    evaluations = sampler.solver.evaluations + (last.solver.evaluations if last else 0)
    bar = sys.stderr.isatty()
    slow = bar and jax.default_backend() == "cpu"  # then a bar by evaluations, else by pictures
    monitor = Monitor(jax.local_device_count()) if slow else None
    watch = monitor.watch(-(-count // batch_size), evaluations) if slow else nullcontext()
    with watch, tqdm(total=count, unit="picture", disable=slow or not bar) as bar:
        for start in range(0, count, batch_size):
            index = np.minimum(np.arange(start, start + batch_size), count - 1)
            keys = image_keys(config.sampler.seed, index)
            job = _Job(config, task, size, keys, given, monitor)
            chosen = [texts[i] for i in index] if texts else None
            latents = job.draw(
                opened.pipeline, params, sampler, chosen, labels[index] if len(labels) else None
            )
            decoder, decoder_params = opened.pipeline, params
            if refiner:
                latents = job.refine(refiner.pipeline, refined, last, chosen, latents)
                decoder, decoder_params = refiner.pipeline, refined
            batch = np.asarray(tasks.decode(decoder, decoder_params, latents, tile=config.tile))
            for i, image in zip(index[: count - start], batch):
                about = _about(config, opened.pipeline, task, int(i), texts, labels, evaluations)
                path = folder / f"{first + len(made):06d}.png"
                figures.save_png(path, figures.to_uint8(image), about)
                made.append(image)
                bar.update()
    if len(made) > 1:
        columns = config.count if config.count > 1 else None
        figures.save_png(folder / "grid.png", figures.image_grid(np.stack(made), columns, scale=1))
    seconds = time.perf_counter() - began
    print(f"{count} pictures in {folder} ({first:06d}.png, ...), {seconds:.0f} s in all")


@dataclasses.dataclass(frozen=True)
class _Job:
    """One batch."""

    config: ConfigDict
    task: str
    size: tuple[int, int]
    keys: jax.Array
    given: dict[str, np.ndarray]
    monitor: Monitor | None

    def draw(
        self,
        pipeline: Pipeline,
        params: Params,
        sampler: Sampler,
        texts: list[str] | None,
        labels: np.ndarray | None,
    ) -> jax.Array:
        s = self.config.sampler
        options = {"scale": s.guidance, "callback": self.monitor}
        given = {name: np.stack([a] * len(self.keys)) for name, a in self.given.items()}
        if self.task == "class_to_image":
            return tasks.class_to_image(pipeline, params, sampler, self.keys, labels, **options)
        cond, null = self.encoded(pipeline, params, texts)
        prompt = (pipeline, params, sampler, self.keys, cond, null)
        if self.task == "text_to_image":
            return tasks.text_to_image(*prompt, size=self.size, rescale=s.rescale, **options)
        images = given["image"]
        if self.task == "image_to_image":
            return tasks.image_to_image(*prompt, images, rescale=s.rescale, **options)
        if self.task == "inpaint":
            options |= {"strength": self.config.strength, "rescale": s.rescale}
            return tasks.inpaint(*prompt, images, given["mask"], **options)
        if self.task == "upscale":
            return tasks.upscale(*prompt, images, noise_level=self.config.noise_level, **options)
        return tasks.instruct(*prompt, images, image_scale=s.image_guidance, **options)

    def refine(
        self, pipeline: Pipeline, params: Params, sampler: Sampler, texts: list[str], latents: Any
    ) -> jax.Array:
        cond, null = self.encoded(pipeline, params, texts)
        options = {"scale": self.config.sampler.guidance, "callback": self.monitor}
        return tasks.refine(pipeline, params, sampler, self.keys, cond, null, latents, **options)

    def encoded(
        self, pipeline: Pipeline, params: Params, texts: list[str]
    ) -> tuple[Conditioning, Conditioning | None]:
        c = self.config
        negative = [c.negative] * len(texts) if c.negative else None
        cond, null = encode_prompts(
            pipeline, params, texts, negative, clip_skip=c.clip_skip, weighted=c.weighted
        )
        if not getattr(pipeline.network, "added_embedding", False):
            return cond, null
        if pipeline.options.get("requires_aesthetics_score"):
            return (
                tasks.micro_conditioning(cond, self.size, aesthetic=6.0),
                tasks.micro_conditioning(null, self.size, aesthetic=2.5),
            )
        return tuple(tasks.micro_conditioning(c, self.size) for c in (cond, null))


def _dtype(config: ConfigDict) -> Any:
    if config.dtype == "auto":
        return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    if config.dtype not in DTYPES:
        raise specs.unknown("config.dtype", config.dtype, ("auto", *DTYPES))
    return DTYPES[config.dtype]


def _open(name: str, where: str, config: ConfigDict, dtype: Any) -> Opened:
    if not where:
        raise ValueError(
            f"config.{name} must name a diffusers folder, a safetensors file or a hub id"
        )
    with field(f"config.{name}={where!r}"):
        return open_pipeline(
            where, revision=config.revision or None, variant=config.variant or None, dtype=dtype
        )


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
            size = pictures.fitting_size(config.image, unit)
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


def _pictures(
    config: ConfigDict, pipeline: Pipeline, task: str, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    given = {}
    if config.image:
        with field(f"config.image={config.image!r}"):
            given["image"] = pictures.read_image(config.image, size)
    if config.mask:
        with field(f"config.mask={config.mask!r}"):
            given["mask"] = pictures.read_mask(config.mask, size)
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
    working = max(o.working_bytes(size, share, config.tile) for o in opened)
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


def _next_number(folder: Path) -> int:
    """Pictures are added to those that are there."""
    numbers = [int(p.stem) for p in folder.glob("[0-9]*.png") if p.stem.isdigit()]
    return max(numbers, default=-1) + 1


def _about(
    config: ConfigDict,
    pipeline: Pipeline,
    task: str,
    index: int,
    texts: list[str],
    labels: np.ndarray,
    evaluations: int,
) -> dict[str, str]:
    """What made a picture: enough to make it again."""
    about = {"prompt": texts[index]} if texts else {"label": str(labels[index])}
    settings = config.to_dict() | about
    about |= {"negative": config.negative, "task": task, "index": str(index)}
    about |= {"seed": str(config.sampler.seed), "evaluations": str(evaluations)}
    solver = config.sampler.solver or pipeline.scheduler["_class_name"]
    about |= {"solver": solver, "settings": json.dumps(settings, default=str)}
    return {name: value for name, value in about.items() if value}
