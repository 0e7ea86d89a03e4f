"""From ``config.model.path``, ``sampler`` and ``samples`` to what is drawn, and how."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import pipelines
from diffusion.config import contents, image_features, judging, ranges
from diffusion.config.data import make_source
from diffusion.data.sources import Source
from diffusion.errors import field
from diffusion.evaluation.metrics.metric import Data, Samples
from diffusion.pipelines import adapters, description, guidance, recognition, samplers
from diffusion.pipelines.conditioners import Subject
from diffusion.pipelines.description import DTYPES
from diffusion.pipelines.draw import program
from diffusion.pipelines.drawer import GIVEN, Drawer
from diffusion.pipelines.from_pretrained import Opened
from diffusion.pipelines.from_run import Run, is_run
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.runs import workdir as workdirs
from diffusion.sampling.progress import Preview
from diffusion.sampling.tables import Solver
from diffusion.specs import texts, unknown

AT = "config.sampler."
MOST = 64
"""Held-out examples whose hints or pictures a model is given, at most."""
# Fields that may differ from those that a run was started with: what the parameters are does not
# depend on them.
FREE = ("parallel", "sampler.*", "samples.*", "evaluation.*", "sweep.*", "learn.*", "inspect.*")
FREE += ("data.threads", "data.workers", "data.prefetch", "model.path", "model.tile", "compare.*")
FREE += ("adapters", "control", "image_prompts", "model.network", "model.family")


@dataclass(frozen=True)
class Drawing:
    """A model that a mode draws from.

    Attributes:
      config: the whole config.
      opened: the model, whose parameters are read when they are first used.
      drawer: how it is drawn from.
      folder: where results go.
    """

    config: ConfigDict
    opened: Opened | Run
    drawer: Drawer
    folder: Path

    @property
    def pipeline(self) -> Pipeline:
        """The model, with labels to ask for where only a classifier knows them."""
        return self.drawer.pipeline

    @cached_property
    def params(self) -> Params:
        """Of the pipeline."""
        return self.opened.load(progress=sys.stderr.isatty())

    @cached_property
    def step(self) -> int:
        """Of training, that the parameters are from; 0 of a pretrained model."""
        return self.opened.restored[1] if isinstance(self.opened, Run) else 0

    @cached_property
    def data(self) -> Data:
        """The real examples of config.data."""
        return judging.data(self.config)

    @property
    def negative(self) -> Subject | None:
        """What to steer away from."""
        return contents.negative(self.config)

    def subjects(self, count: int, captions: Sequence[str] = ()) -> list[Subject]:
        """What ``count`` samples are of; see ``in_turn``."""
        return self.drawer.subjects(count, contents.in_turn(self.config, self.drawer, captions))

    def table(self, solver: str, grid: str, steps: int, name: str) -> Solver:
        """The table of another solver than that of config.sampler; ``name`` is for its errors.

        Raises ValueError for one that differs in more than its table, such as in clipping.
        """
        pipeline, own = self.pipeline, self.drawer.sampler
        made = samplers.make(pipeline, solver, grid, steps, at=AT, solver_name=name)
        if program(pipeline, made) != program(pipeline, own):
            raise ValueError(
                f"{name}={solver!r} clips or predicts otherwise than {AT}solver="
                f"{self.config.sampler.solver!r}; expected one that differs in its steps alone"
            )
        return made.solver

    @cached_property
    def captions(self) -> tuple[str, ...]:
        """Those of held-out examples, for a model of texts that is not told what to draw."""
        told = self.pipeline.conditioner.subject != "text" or contents.subjects(self.config)
        return () if told else tuple(dict.fromkeys(self.data.held_out.captions))

    def samples(self, count: int, solver: Solver | None = None, seed: int | None = None) -> Samples:
        """``count`` samples as the data are, by config.sampler or another table or seed.

        A model of texts draws ``captions``, where config.samples has none.
        """
        drawer = self.drawer if seed is None else replace(self.drawer, seed=seed)
        return contents.samples(self.config, drawer, self.params, count, self.captions, solver)


def opened(config: ConfigDict, workdir: str, preview: Preview | None = None) -> Drawing:
    """What a mode draws from: ``config.model.path``, or the run in ``workdir``.

    Raises:
      ValueError, FileNotFoundError: there is no such model, or a field does not fit.
    """
    ranges.check(config)
    source = source_of(config, workdir)
    pipeline = source.pipeline
    schedule = source.description.schedule if isinstance(source, Run) else ""
    made, notes = drawer(config, pipeline, schedule, preview)
    for note in notes:
        print(f"note: {note}")
    made = given(made, lambda: _held_out(config, source))
    return Drawing(config, source, made, Path(workdir))


def _held_out(config: ConfigDict, source: Opened | Run) -> Source:
    """Held-out examples, with the features of pictures that a run's adapter takes."""
    held_out = make_source(config.data, "test")
    adapter = source.adapter if isinstance(source, Run) and source.base is not None else None
    if hasattr(adapter, "feature"):
        held_out = image_features.added(config, adapter, "test", held_out)
    return held_out


def source_of(config: ConfigDict, workdir: str | None) -> Opened | Run:
    """The model of ``config.model.path``, or else of ``workdir``, not read yet."""
    c, name = config.model, f"config.model.path={config.model.path!r}"
    # A fine-tuned run's path is that of the model that it began with.
    fine_tuned = c.name == "pretrained" and workdir and is_run(workdir)
    if workdir and (fine_tuned or not c.path):
        if not is_run(workdir):
            raise FileNotFoundError(f"there is no run in {workdir}; or name config.model.path")
        path, name = workdir, f"--workdir={workdir}"
    else:
        path = c.path
    source = open_model(config, path, name, c.network)
    if isinstance(source, Run):
        _check_same(config, path)
    source = adapters.attach(source, config.adapters, "config.adapters")
    if isinstance(source, Run):
        return source
    names = [*adapters.paths(config.adapters), c.network, path]
    source = recognition.chosen(source, c.family, names, "config.model.family")
    if c.family == "auto" and source.pipeline.few_steps is not None:
        few = source.pipeline.few_steps
        print(
            f"note: {few.name}, as the model's files say: {few.solver}, {few.usual} steps, cfg("
            f"{few.scale:g}); config.model.family names another family, or none by ''"
        )
    return source


def _check_same(config: ConfigDict, path: str) -> None:
    """Refuses fields of what a run's parameters are, which drawing cannot change."""
    unused = (*FREE, "train.*", "optimizer.*", "log.*", "profile.*")
    changes = workdirs.differences(path, config.to_dict(), (*unused, "data.*"))
    if changes:
        raise ValueError(
            f"the run in {path} was trained with another configuration:\n"
            + "\n".join(changes)
            + "\nDrawing cannot change these. Leave them out (without --config, the run's own "
            "configuration is read), or train another run with them"
        )
    check(config, path, unused)


def open_model(config: ConfigDict, path: str, name: str, network: str = "") -> Opened | Run:
    """A model to draw from, opened as config.model describes; weights are not read yet.

    ``name`` is the model's name in error messages, ``network`` one to take instead of its own.
    """
    c, computes = config.model, dtype(config)
    with field(name):
        if is_run(path):
            if c.family != "auto":
                raise ValueError(
                    f"config.model.family={c.family!r} has no effect: it is for pretrained models"
                )
            own, computes = description.read(path).dtype, None
            if c.dtype not in ("auto", own):
                raise ValueError(f"config.model.dtype={c.dtype!r} has no effect: the run has {own}")
        source = pipelines.open_any(
            path,
            average=config.sampler.average,
            checkpoint=config.sampler.checkpoint,
            revision=c.revision or None,
            variant=c.variant or None,
            prediction_type=c.prediction_type or None,
            tokenizer=c.tokenizer,
            vae=c.vae,
            network=network,
            family="",  # source_of chooses it, by adapters too
            dtype=computes,
            tile=c.tile,
        )
        if isinstance(source, Run):
            source.check_draws()
    return source


def dtype(config: ConfigDict) -> Any:
    """Of a pretrained model; None: as fits the device."""
    known = {"auto": None, **DTYPES, "float16": jnp.float16}
    if config.model.dtype not in known:
        raise unknown("config.model.dtype", config.model.dtype, known)
    return known[config.model.dtype]


def check(config: ConfigDict, workdir: str, changeable: tuple[str, ...]) -> None:
    """Refuses a workdir whose run had another config; prints differences that are accepted."""
    listed = "\n".join(workdirs.differences(workdir, config.to_dict(), changeable))
    if listed and not config.train.accept_changes:
        raise ValueError(
            f"{workdir} holds a run with another configuration:\n{listed}\nChoose another workdir, "
            "or the run's own settings; or go on with these all the same: "
            "--config.train.accept_changes=True"
        )
    if listed:
        print(f"{workdir}: going on although its run had another configuration:\n{listed}")


def settings(config: ConfigDict, pipeline: Pipeline, step: int) -> dict[str, Any]:
    """What samples depend on, as JSON has it, with what "auto" stands for.

    ``step`` is the checkpoint's.
    """
    own, s = pipeline.defaults, config.sampler.to_dict()
    for name in ("checkpoint", "batch_size", "preview_every"):
        s.pop(name)
    if s["solver"] == "auto":
        s["solver"] = own.solver or pipeline.scheduler["_class_name"]
    if s["grid"] == "auto" and not s["solver"][0].isupper():
        s["grid"] = samplers.chosen_grid(pipeline, s["grid"])
    s["steps"] = s["steps"] or own.steps
    s["guidance"] = texts(own.guidance if s["guidance"] == "auto" else s["guidance"])
    s["acceleration"] = texts(s["acceleration"])
    names = ("path", "revision", "variant", "prediction_type", "dtype", "tokenizer", "vae")
    few = "" if pipeline.few_steps is None else pipeline.few_steps.name
    asked = {name: config.samples[name] for name in ("prompt", "labels", "negative")}
    for name in ("prompt", "labels"):
        if str(asked[name]).startswith("@"):  # the file may change
            asked[name] = contents.subjects(config)
    return {
        "step": step,
        "model": {n: config.model[n] for n in (*names, "network")} | {"family": few},
        "sampler": s,
        "samples": asked,
        **({"adapters": adapters.listed(config.adapters)} if config.adapters else {}),
    }


def drawer(
    config: ConfigDict, pipeline: Pipeline, schedule: str = "", preview: Preview | None = None
) -> tuple[Drawer, list[str]]:
    """How config.sampler draws from a pipeline, and what a user should know about it.

    Args:
      config: the whole config.
      pipeline: the model.
      schedule: the pipeline's, as a spec, to compare that of other runs with.
      preview: is given x_0_hat every ``config.sampler.preview_every`` evaluations.

    Raises:
      ValueError: for impossible fields; the message names them.
    """
    c = config.sampler
    sampler = samplers.make(pipeline, c.solver, c.grid, c.steps, at=AT)
    corrector = samplers.make_corrector(c.corrector, sampler, AT)
    made = guidance.make(
        pipeline,
        sampler,
        c.guidance,
        negative=contents.negative(config),
        accelerations=c.acceleration,
        schedule=schedule,
        corrected=corrector is not None,
        at=AT,
    )
    with field("config.samples"):
        for subject in contents.subjects(config):
            made.pipeline.conditioner.check(subject)
    if contents.negative(config) is not None:
        with field(f"config.samples.negative={contents.negative(config)!r}"):
            made.pipeline.conditioner.check(contents.negative(config))
    result = Drawer(
        made.pipeline,
        sampler,
        made.chain,
        companions=made.companions,
        acceleration=made.acceleration,
        corrector=corrector,
        batch_size=batch_size(config, pipeline),
        seed=c.seed,
        preview=preview,
        preview_every=c.preview_every,
        paired=made.paired,
    )
    grid = samplers.chosen_grid(pipeline, c.grid)
    return result, [*made.notes, *samplers.notes(sampler, grid, AT)]


def given(drawer: Drawer, held_out: Callable[[], Source]) -> Drawer:
    """The drawer with what its model is given of held-out examples in turn, such as hints.

    ``held_out`` is called if the model is given something.

    Raises:
      ValueError: the data have no such thing.
    """
    wanted = drawer.pipeline.columns
    if not wanted:
        return drawer
    source = held_out()
    rows = source.read(np.arange(min(len(source), MOST)))
    for name in wanted:
        if name not in rows:
            raise ValueError(f"{source.name} has none: this model is given {GIVEN[name]}")
    pipeline, captions = drawer.pipeline, tuple(source.captions[:MOST])
    if pipeline.conditioner.subject == "text" and captions:  # by default each has its own caption
        conditioner = replace(pipeline.conditioner, suggestions=captions)
        drawer = replace(drawer, pipeline=replace(pipeline, conditioner=conditioner))
    return replace(drawer, given={name: rows[name] for name in wanted})


def batch_size(config: ConfigDict, pipeline: Pipeline) -> int:
    """Samples at a time."""
    return config.sampler.batch_size or (100 if pipeline.scheduler is None else 1)
