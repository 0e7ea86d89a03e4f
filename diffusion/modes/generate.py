"""--mode=generate: pictures from a pretrained pipeline."""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from diffusion.conditioning import Conditioning
from diffusion.evaluation import figures
from diffusion.modes.request import Request, read
from diffusion.pipelines import tasks
from diffusion.pipelines.codec import decode
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pipelines.prompts import encode_prompts
from diffusion.sampling.progress import Monitor
from diffusion.sampling.sample import Callback, image_keys


def generate(config: ConfigDict, workdir: str | None) -> None:
    """Writes pictures as ``configs/stable_diffusion.py`` describes.

    Leaves in ``workdir`` (default "generated") a PNG per picture, named after what number of the
    folder it is, with all settings as text chunks, and grid.png where there are several.

    Raises:
      ValueError, FileNotFoundError: a field that does not fit, before weights are read.
    """
    began, folder = time.perf_counter(), Path(workdir or "generated")
    request = read(config)
    pipeline, count = request.opened.pipeline, request.count
    height, width = request.size
    print(
        f"{config.model}: {pipeline.kind}, {request.task.replace('_', ' ')}, "
        f"{count} of {width} x {height} pixels"
    )
    bar = sys.stderr.isatty()
    params = request.opened.load(progress=bar)
    refined = request.refiner.load(progress=bar) if request.refiner else None
    folder.mkdir(parents=True, exist_ok=True)
    first, made = _next_number(folder), []
    batches = -(-count // request.batch_size)
    slow = bar and jax.default_backend() == "cpu"  # then a bar by evaluations, else by pictures
    monitor = Monitor(jax.local_device_count()) if slow else None
    watch = monitor.watch(batches, request.evaluations) if slow else nullcontext()
    with watch, tqdm(total=count, unit="picture", disable=slow or not bar) as progress:
        for batch in range(batches):
            start = batch * request.batch_size
            index = np.minimum(np.arange(start, start + request.batch_size), count - 1)
            images = _draw(config, request, params, refined, index, monitor)
            for i, image in zip(index[: count - start], images):
                path = folder / f"{first + len(made):06d}.png"
                figures.save_png(path, figures.to_uint8(image), _about(config, request, int(i)))
                made.append(image)
                progress.update()
    if len(made) > 1:
        columns = config.count if config.count > 1 else None
        figures.save_png(folder / "grid.png", figures.image_grid(np.stack(made), columns, scale=1))
    last = f" to {first + count - 1:06d}.png" if count > 1 else ""
    seconds = time.perf_counter() - began
    print(f"{folder}/{first:06d}.png{last}: {seconds:.0f} s in all")


def _draw(
    config: ConfigDict,
    request: Request,
    params: Params,
    refined: Params | None,
    index: np.ndarray,
    callback: Callback | None,
) -> np.ndarray:
    """Pictures number ``index`` [B]: [B, H, W, 3] in [-1, 1]."""
    c, pipeline, task = config.sampler, request.opened.pipeline, request.task
    keys = image_keys(c.seed, index)
    given = {name: np.stack([a] * len(index)) for name, a in request.given.items()}
    common = (pipeline, params, request.sampler, keys)
    options = {"guidance": request.guidance, "callback": callback}
    if task == "class_to_image":
        latents = tasks.class_to_image(*common, request.labels[index], **options)
        return np.asarray(decode(pipeline, params, latents))
    texts = [request.texts[i] for i in index]
    common += _encoded(config, request, pipeline, params, texts)
    if task == "text_to_image":
        latents = tasks.text_to_image(*common, size=request.size, **options)
    elif task == "image_to_image":
        latents = tasks.image_to_image(*common, given["image"], **options)
    elif task == "inpaint":
        options["strength"] = config.strength
        latents = tasks.inpaint(*common, given["image"], given["mask"], **options)
    elif task == "upscale":
        options["noise_level"] = config.noise_level
        latents = tasks.upscale(*common, given["image"], **options)
    else:
        latents = tasks.instruct(*common, given["image"], **options)
    if request.refiner:
        pipeline, params = request.refiner.pipeline, refined
        prompt = _encoded(config, request, pipeline, params, texts)
        latents = tasks.refine(pipeline, params, request.last, keys, *prompt, latents, **options)
    return np.asarray(decode(pipeline, params, latents))


def _encoded(
    config: ConfigDict, request: Request, pipeline: Pipeline, params: Params, texts: list[str]
) -> tuple[Conditioning, Conditioning]:
    """What to steer towards, and away from."""
    cond, null = encode_prompts(
        pipeline,
        params,
        texts,
        config.negative or None,
        clip_skip=config.clip_skip,
        weighted=config.weighted,
    )
    if not pipeline.network.added_embedding:
        return cond, null
    scored = pipeline.options.get("requires_aesthetics_score")
    sizes = {"original": config.original or None, "crop": config.crop}
    return tuple(
        tasks.micro_conditioning(c, request.size, aesthetic=score, **sizes)
        for c, score in zip((cond, null), config.aesthetic if scored else (None, None))
    )


def _next_number(folder: Path) -> int:
    """Pictures are added to those that are there."""
    numbers = [int(p.stem) for p in folder.glob("[0-9]*.png") if p.stem.isdigit()]
    return max(numbers, default=-1) + 1


def _about(config: ConfigDict, request: Request, index: int) -> dict[str, str]:
    """What made a picture: enough to make it again."""
    subject = {"prompt": request.texts[index]} if request.texts else {}
    subject |= {"label": str(request.labels[index])} if len(request.labels) else {}
    about = subject | {
        "negative": config.negative,
        "task": request.task,
        "seed": str(config.sampler.seed),
        "index": str(index),
        "evaluations": str(request.evaluations),
        "solver": config.sampler.solver or request.opened.pipeline.scheduler["_class_name"],
        "settings": json.dumps(config.to_dict() | subject, default=str),
    }
    return {name: value for name, value in about.items() if value}
