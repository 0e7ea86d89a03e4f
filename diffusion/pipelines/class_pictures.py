"""Pictures of a subject's class, drawn by the model that is to learn the subject (DreamBooth)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from diffusion.data.folder import pictures as pictures_in
from diffusion.evaluation import figures
from diffusion.pipelines.generation import Generation
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.pipelines.request import Request

USUAL = Request()
PROMPT = "prompt"
"""The text chunk of a picture that says what was asked for."""


def generate_class_pictures(
    pipeline: Pipeline,
    params: Params,
    prompt: str,
    count: int,
    folder: str | Path,
    request: Request = USUAL,
) -> int:
    """Draws what is missing of ``count`` pictures of a prompt, into PNGs; gives how many.

    Picture i is of ``request.seed`` and i, so that an interrupted call goes on as if it had never
    stopped. A file appears when it is whole.

    Raises:
      ValueError: the folder has pictures that were drawn of another prompt.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    there = pictures_in(folder)
    check(there, prompt)
    missing = count - len(there)
    if missing <= 0:
        return 0
    first = max((int(path.stem) for path in there if path.stem.isdecimal()), default=-1) + 1
    made = Generation(pipeline, [prompt] * missing, request)
    for i, picture in made.pictures(params, first=first):
        path = folder / f"{i:06d}.png"
        partial = path.with_name(f".{path.name}")  # hidden, so that it is no picture yet
        about = {PROMPT: prompt, "seed": str(request.seed), "index": str(i)}
        figures.save_png(partial, figures.to_uint8(picture), about)
        os.replace(partial, path)
    return missing


def check(files: Sequence[Path], prompt: str) -> None:
    """Raises ValueError for a picture that was drawn of another prompt."""
    for path in files:
        if path.suffix.lower() != ".png":
            continue
        with Image.open(path) as image:
            image.load()
            drawn = getattr(image, "text", {}).get(PROMPT, prompt)
        if drawn != prompt:
            raise ValueError(
                f"{path} was drawn of {drawn!r}, not of {prompt!r}: choose another folder, or "
                "delete its pictures"
            )
