"""Pictures of a subject's class that ``config.data.subject`` wants and the model is to draw."""

from __future__ import annotations

import dataclasses

from ml_collections import ConfigDict

from diffusion import pipelines
from diffusion.config import drawing, initialization, subject
from diffusion.errors import field
from diffusion.pipelines.class_pictures import check, generate_class_pictures
from diffusion.pipelines.from_pretrained import Opened
from diffusion.pipelines.from_run import Run
from diffusion.pipelines.request import Request


def draw_missing(config: ConfigDict) -> int | None:
    """Draws what ``class_dir`` lacks of ``class_count`` pictures, and gives how many that were.

    None where the data have no class. They are drawn by the model that training begins with, as
    config.sampler says.

    Raises:
      ValueError, FileNotFoundError: there is no such model, or it takes no prompts; the message
        names the field.
    """
    own = config.data.subject
    if config.data.name != "subject" or not own.class_dir:
        return None
    subject.check(config.data)
    there = subject.class_pictures(config.data)
    with field(f"{subject.AT}class_dir={own.class_dir!r}"):
        check(there, own.class_prompt)
        if len(there) >= own.class_count:
            return 0
        opened = _model(config)
        given = config.sampler.to_dict()
        names = {f.name for f in dataclasses.fields(Request)} & set(given)
        request = Request(**{name: given[name] for name in names})
        size = drawing.batch_size(config, opened.pipeline)
        request = dataclasses.replace(request, batch_size=size)
        print(f"{own.class_dir}: drawing {own.class_count - len(there)} pictures of the class")
        return generate_class_pictures(
            opened.pipeline,
            opened.load(),
            own.class_prompt,
            own.class_count,
            own.class_dir,
            request,
        )


def _model(config: ConfigDict) -> Opened | Run:
    """The model that training begins with."""
    path = config.model.path
    if path:
        return drawing.open_model(config, path, f"config.model.path={path!r}")
    if not config.train.init_from:
        raise ValueError(
            "it has too few pictures, and there is no model to draw others: expected "
            "config.model.path, config.train.init_from or more pictures"
        )
    root, step = initialization.source_of(config.train.init_from)
    checkpoint = "newest" if step is None else str(step)
    return pipelines.open_any(root, average=config.train.init_average, checkpoint=checkpoint)
