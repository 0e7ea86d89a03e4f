"""Pairs of noise and a teacher's samples, as data: drawn once, kept in the teacher's workdir."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import partial

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.data import array_cache
from diffusion.data.sources import Batch, Source
from diffusion.errors import field
from diffusion.objectives.few_steps.reflow import Reflow
from diffusion.pipelines import guidance, samplers
from diffusion.pipelines.drawer import Drawer
from diffusion.pipelines.from_run import Run
from diffusion.runs.workdir import named
from diffusion.sampling.sample import image_keys, image_noise

FOLDER = "pairs"
BATCH = 256


def source(config: ConfigDict, method: Reflow, scale: float, teacher: Run, train: Source) -> Source:
    """The pairs, with labels or captions of the training data in turn.

    Raises:
      ValueError: the data are changed after they are drawn, or the teacher cannot draw so.
    """
    if config.data.flip:
        raise ValueError(
            "config.data.flip=True mirrors samples and not the noise that they are made of"
        )
    pipeline, average = teacher.pipeline, teacher.average
    with field(f"config.few_steps.method={config.few_steps.method!r}"):
        sampler = samplers.make(pipeline, method.solver, steps=method.steps)
    chain = () if scale == 1 else (f"cfg({scale})",)
    with field(f"config.few_steps.guidance={config.few_steps.guidance!r}"):
        guided = guidance.make(pipeline, sampler, chain)
    _, step = teacher.restored
    about = {
        "teacher": str(teacher.path.resolve()),
        "step": step,
        "average": average,
        "count": method.count,
        "solver": method.solver,
        "steps": method.steps,
        "guidance": scale,
        "data": train.name,
        "seed": config.seed,
    }
    drawer = Drawer(pipeline, sampler, guided.chain, batch_size=BATCH, seed=config.seed)
    rows = partial(_rows, drawer, teacher.load(), train)
    folder = teacher.path / FOLDER / named(about)
    if jax.process_index() == 0 and not folder.exists():
        print(f"drawing {method.count:,} pairs of {teacher.path} into {folder}")
    columns = array_cache.compute(folder, method.count, rows, about, batch_size=BATCH)
    captions = train.captions
    if captions:
        captions = tuple(captions[i % len(captions)] for i in range(method.count))
    return dataclasses.replace(
        train,
        size=method.count,
        read=partial(_read, columns, captions, train.encode),
        captions=captions,
        crop=None,
        buckets=(),
        shares=(),
        pictures=None,
    )


def _rows(drawer: Drawer, params, train: Source, index: np.ndarray) -> Batch:
    given = train.read(index % len(train))
    subjects = [0] * len(index)
    if drawer.pipeline.conditioner.subject == "label":
        subjects = [int(label) for label in given["label"]]
    elif train.captions:
        subjects = [train.captions[i % len(train)] for i in index]
    labels = {"label": given["label"]} if "label" in given else {}
    noise = image_noise(image_keys(drawer.seed, index), drawer.pipeline.shape)
    return {"x": drawer.draw(params, subjects, first=int(index[0])), "noise": noise} | labels


def _read(
    columns: Mapping[str, np.ndarray], captions: tuple[str, ...], encode, index: np.ndarray
) -> Batch:
    batch = {name: np.asarray(values[index]) for name, values in columns.items()}
    return batch | (encode([captions[i] for i in index]) if captions else {})
