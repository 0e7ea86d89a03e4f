"""--mode=generate: pictures as config.samples asks for them, from any model."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.config import contents, drawing, ranges
from diffusion.errors import field
from diffusion.evaluation import figures
from diffusion.pipelines import adapters, memory
from diffusion.pipelines.conditioners import Subject
from diffusion.pipelines.from_pretrained import Opened
from diffusion.pipelines.from_run import Run, is_run
from diffusion.pipelines.generation import Generation
from diffusion.pipelines.request import Request

TIGHT = 1.6  # what a network needs may be so many times the estimate


def run(config: ConfigDict, workdir: str | None) -> None:
    """Writes pictures of prompts or classes: new ones, or from a picture, repainted, enlarged.

    What is done follows from the model and from the fields that are set: ``samples.image`` alone
    makes pictures from a picture, with ``samples.mask`` it repaints the mask's white part; an
    upscaler or an InstructPix2Pix does what it was trained for; ``model.refiner`` takes SDXL's last
    steps.

    Leaves in ``workdir`` (default "generated"; of a run its folder "generated") a PNG per picture,
    named after what number of the folder it is, with all settings as text chunks, and where there
    are several grids/FIRST_LAST.png. The maps that config.control follows are saved beside the
    first, as FIRST_canny.png.

    Raises:
      ValueError, FileNotFoundError: a field that does not fit, before weights are read.
    """
    began = time.perf_counter()
    source, refiner, made = checked(config, workdir)
    for note in made.notes:
        print(f"note: {note}")
    folder = Path(workdir or "generated")
    if is_run(folder):
        folder = folder / "generated"
    height, width = made.size
    what = f"{source.name}: {made.pipeline.kind}, {made.task}"
    print(f"{what}, {len(made.subjects)} of {width} x {height} pixels")
    bar = sys.stderr.isatty()
    params = source.load(progress=bar)
    refined = refiner.load(progress=bar) if refiner else None
    folder.mkdir(parents=True, exist_ok=True)
    first, pictures = _next_number(folder), []
    for i, picture in made.pictures(params, refined):
        path = folder / f"{first + len(pictures):06d}.png"
        about = _about(config, made, made.subjects[i], i)
        if isinstance(source, Run):
            about["step"] = str(source.restored[1])
        figures.save_png(path, figures.to_uint8(picture), about)
        pictures.append(picture)
    for extension in made.extensions:
        for name, picture in extension.pictures.items():
            figures.save_png(folder / f"{first:06d}_{name}.png", figures.to_uint8(picture))
    if len(pictures) > 1:
        columns = config.samples.count if config.samples.count > 1 else None
        grid, last = np.stack(pictures), first + len(pictures) - 1
        (folder / "grids").mkdir(exist_ok=True)
        path = folder / "grids" / f"{first:06d}_{last:06d}.png"
        figures.save_png(path, figures.image_grid(grid, columns, scale=1))
    last = f" to {first + len(pictures) - 1:06d}.png" if len(pictures) > 1 else ""
    seconds = time.perf_counter() - began
    print(f"{folder}/{first:06d}.png{last}: {seconds:.0f} s in all")


def checked(
    config: ConfigDict, workdir: str | None = None
) -> tuple[Opened | Run, Opened | Run | None, Generation]:
    """The model, a refiner or None, and what they are to make; no weight is read.

    Raises:
      ValueError, FileNotFoundError: a field that does not fit, or too little memory.
    """
    ranges.check(config)
    source, refiner = drawing.source_of(config, workdir), _refiner(config)
    with field("config.samples"):
        made = Generation(
            source.pipeline,
            _subjects(config, source),
            _request(config, source),
            refiner=refiner and refiner.pipeline,
            at=drawing.AT,
        )
    _check_memory(config, [o for o in (source, refiner) if isinstance(o, Opened)], made)
    return source, refiner, made


def _refiner(config: ConfigDict) -> Opened | Run | None:
    c = config.model
    if not c.refiner:
        return None
    return drawing.open_model(config, c.refiner, "config.model.refiner")


def _subjects(config: ConfigDict, source: Opened | Run) -> list[Subject]:
    """The prompt or class of every picture."""
    given = contents.subjects(config) or list(source.pipeline.conditioner.suggestions)
    kind = source.pipeline.conditioner.subject
    if not given and kind:
        name = "prompt" if kind == "text" else "labels"
        raise ValueError(f"{name}: say what should be in the picture")
    return [subject for subject in given or [0] for _ in range(config.samples.count or 1)]


def _request(config: ConfigDict, source: Opened | Run) -> Request:
    s = config.samples
    given = s.to_dict() | config.sampler.to_dict()
    given = {f.name: given[f.name] for f in dataclasses.fields(Request) if f.name in given}
    return Request(
        **given
        | {
            "negative": contents.negative(config),
            "control": config.control,
            "image_prompts": config.image_prompts,
            "image": s.image or None,
            "mask": s.mask or None,
            "size": (s.height, s.width),
            "batch_size": drawing.batch_size(config, source.pipeline),
        }
    )


def _next_number(folder: Path) -> int:
    """Pictures are added to those that are there."""
    numbers = [int(p.stem) for p in folder.glob("[0-9]*.png") if p.stem.isdigit()]
    return max(numbers, default=-1) + 1


def _about(config: ConfigDict, made: Generation, subject: Subject, index: int) -> dict[str, str]:
    """What made a picture: enough to make it again."""
    kind = {"text": "prompt", "label": "label", "": "subject"}[made.pipeline.conditioner.subject]
    scheduler, few = made.pipeline.scheduler, made.pipeline.few_steps
    solver = config.sampler.solver
    if solver == "auto":
        solver = made.pipeline.defaults.solver or scheduler["_class_name"]
    about = {
        kind: str(subject),
        "negative": str(config.samples.negative),
        "task": made.task,
        "seed": str(config.sampler.seed),
        "index": str(index),
        "evaluations": str(made.evaluations),
        "adapters": ", ".join(adapters.listed(config.adapters)),
        "family": "" if few is None else few.name,
        "solver": solver,
        "settings": json.dumps(config.to_dict() | {kind: subject}, default=str),
    }
    return {name: value for name, value in about.items() if value}


def _check_memory(config: ConfigDict, opened: list[Opened], made: Generation) -> None:
    """Says what will not fit, or may not, before weights are read."""
    free = memory.available(jax.local_devices()[0])
    if free is None or not opened:
        return
    factor = made.pipeline.codec.factor if made.task == "upscale" else 1
    size = tuple(factor * side for side in made.size)
    weights = sum(o.nbytes for o in opened)
    share = -(-min(made.request.batch_size, len(made.subjects)) // jax.local_device_count())
    working = max(o.working_bytes(size, share) for o in opened)
    gib = 2**30
    needs = (
        f"weights take {weights / gib:.1f} GiB and the computation about {working / gib:.1f}, "
        f"of {free / gib:.1f} GiB that are free"
    )
    helps = "a smaller config.sampler.batch_size, config.samples.height and width, or "
    helps += "config.model.tile=512 helps"
    if opened[0].dtype == "float32":
        helps += ", and so does config.model.dtype=bfloat16"
    if weights + working > free:
        raise ValueError(f"not enough memory: {needs}; {helps}")
    if weights + TIGHT * working > free:
        print(f"note: memory may not suffice: {needs}; if so, {helps}")
