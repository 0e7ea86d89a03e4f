"""Training of adapters: from ``config.objective.adapter`` and a model to what is trained.

``config.model.name="pretrained"`` with a ``config.model.path``, a run's workdir or a pipeline's
folder or id, names the model that the adapter is for. Its levels, its prediction and its captions'
tokens are the adapter's, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from diffusion.adapters.adapter import Adapter
from diffusion.config import image_features, pretrained_network
from diffusion.data import sources
from diffusion.data.sources import Source
from diffusion.data.templates import sentences
from diffusion.errors import field
from diffusion.objectives.adapting import OWN, Adapting
from diffusion.objectives.denoising import Denoising
from diffusion.pipelines import adapted, concepts, description, joint
from diffusion.pipelines.description import DTYPES, Description
from diffusion.pipelines.from_pretrained import Opened
from diffusion.pipelines.from_run import Run, is_run, open_base
from diffusion.pipelines.pipeline import Defaults, Params, Pipeline
from diffusion.runs import workdir as workdirs
from diffusion.specs import texts

NAME = "config.objective.adapter"
FROM_BASE = ("schedule", "prediction", "c_noise")
"""Fields of config.objective that are the model's, and "auto" therefore."""


def is_adapted(config: ConfigDict) -> bool:
    """Whether an adapter is trained."""
    return bool(config.objective.adapter)


@dataclasses.dataclass(frozen=True)
class Adaptation:
    """An adapter and the model that it is for.

    Attributes:
      config: the whole config.
      opened: the model.
      adapter: what is trained.
      captions: some that are held out, which are drawn by default.
    """

    config: ConfigDict
    opened: Opened | Run
    adapter: Adapter
    captions: tuple[str, ...] = ()

    @cached_property
    def base(self) -> Pipeline:
        """The model without the adapter."""
        return self.opened.pipeline

    @cached_property
    def pipeline(self) -> Pipeline:
        """The model with it."""
        with field(f"{NAME}={self.config.objective.adapter!r}"):
            return adapted.pipeline(self.base, self.adapter, self._defaults, self.captions)

    @property
    def joint(self) -> Pipeline:
        """What is trained: the network with text encoders and adapter inside."""
        network = self.adapter.network(joint.network(self.base))
        return dataclasses.replace(self.base, network=network)

    @cached_property
    def params(self) -> Params:
        """The model's parameters."""
        return self.opened.load()

    @cached_property
    def frozen(self) -> Any:
        """The joint network's parameters without the adapter."""
        return joint.params(self.base, self.params)

    @property
    def others(self) -> Params:
        """Parameters of the pipeline that the joint network does not hold."""
        return {k: v for k, v in self.params.items() if k not in ("network", "encoders")}

    def source(self, images: Source, split: str) -> Source:
        """The data with what the model is conditioned on: tokens of captions, or labels.

        An adapter of pictures gets these as features, too.

        Raises:
          ValueError: the model takes captions, or other labels, and the data have none of these.
        """
        conditioner, name = self.pipeline.conditioner, f"config.data.name={self.config.data.name!r}"
        if conditioner.subject == "label" and images.num_classes != conditioner.count:
            raise ValueError(
                f"{name} has {images.num_classes} classes; the model knows {conditioner.count}"
            )
        if images.shape != self.base.shape:
            raise ValueError(
                f"{name}: the examples are {images.shape} as the network sees them; the model in "
                f"{self.config.model.path} was trained on {self.base.shape} (config.data.size, "
                "config.data.autoencoder)"
            )
        if hasattr(self.adapter, "feature"):
            with field(f"{NAME}={self.config.objective.adapter!r}"):
                images = image_features.added(self.config, self.adapter, split, images)
        if conditioner.subject != "text":
            return images
        if not images.captions:
            raise ValueError(f"{name} has no captions, which the model takes")
        prompts = joint.encoders(self.pipeline)  # which knows the words that are learned
        encode = conditioner.encode if prompts is None else partial(joint.encode, prompts)
        if hasattr(self.adapter, "token") and split == "train":
            with field(f"{NAME}={self.config.objective.adapter!r}"):
                prompts_of = sentences(self.config.data.template, images.captions)
                concepts.check_prompts(self.adapter, self.base, encode, prompts_of)
        columns = encode(images.captions)
        if getattr(prompts, "sdxl", False):
            sides = tuple(self.base.codec.factor * side for side in images.shape[:2])
            ids = np.array([*sides, 0, 0, *sides], np.float32)  # size, place of the crop, target
            columns["time_ids"] = np.broadcast_to(ids, (len(images), 6))
        made = sources.with_columns(images, columns, without=("label",))
        return dataclasses.replace(made, num_classes=0, class_names=(), encode=encode)

    def describe(self) -> Description:
        """What ``model.json`` says of the run."""
        path = self.config.model.path
        fields = {
            "path": str(Path(path).absolute()) if Path(path).exists() else path,
            "adapter": self.config.objective.adapter,
            "base": adapted.fingerprint(path),
        }
        known = getattr(self.opened, "description", None)
        dtype = next(name for name, kind in DTYPES.items() if kind == self._dtype)
        return Description(
            adapted.NETWORK,
            fields,
            schedule="" if known is None else known.schedule,
            prediction="",
            c_noise="",
            shape=tuple(self.base.shape),
            dtype=dtype if known is None else known.dtype,
            view="images" if known is None else known.view,
            captions=self.captions,
            sampler=self._defaults,
        )

    def objective(self, objective: Denoising) -> Adapting:
        """The denoising objective of the joint network, as the adapter's."""
        return Adapting(objective, self.adapter, joint.network(self.base), adapted.parts(self.base))

    def initial(self) -> Callable[[Any, Callable[[], Any]], Any]:
        """Gives the parameters that training begins with."""

        def load(shapes: Any, random: Callable[[], Any]) -> Any:
            key = jax.random.fold_in(jax.random.key(self.config.seed), 1)
            own = jax.jit(self.adapter.init)(key, self.frozen)
            return {**(random() if set(shapes) > {OWN} else {}), OWN: own}

        return load

    @property
    def _dtype(self) -> Any:
        return DTYPES["float32" if self.config.model.dtype == "auto" else self.config.model.dtype]

    @property
    def _defaults(self) -> Defaults:
        """The model's own where config.sampler leaves a field open."""
        c, usual = self.config.sampler, self.base.defaults
        if getattr(self.adapter, "edits", False):
            usual = usual._replace(guidance=("instruct(7.5, 1.5)",))
        return Defaults(
            usual.solver if c.solver == "auto" else c.solver,
            usual.grid if c.grid == "auto" else c.grid,
            c.steps or usual.steps,
            usual.guidance if c.guidance == "auto" else tuple(texts(c.guidance)),
        )


def make(config: ConfigDict) -> Adaptation | None:
    """The adaptation of a config, or None where no adapter is trained.

    Raises:
      ValueError, FileNotFoundError: there is no such model or adapter, or they do not fit.
    """
    if not is_adapted(config):
        return None
    c, path = config.objective, config.model.path
    if not pretrained_network.is_pretrained(config) or not path:
        raise ValueError(
            f"{NAME}={c.adapter!r} is trained for a model: set config.model.name=pretrained and "
            "config.model.path, a run's workdir or a pipeline's folder or id"
        )
    if c.name not in ("denoising", "few_steps"):
        raise ValueError(
            f"{NAME}={c.adapter!r} has the objective denoising or few_steps, not {c.name!r}"
        )
    for name in FROM_BASE:
        if c[name] != "auto":
            raise ValueError(
                f"config.objective.{name}={c[name]!r} has no effect: an adapter takes that of "
                f"{path}; leave it 'auto'"
            )
    with field(f"config.model.path={path!r}"):
        dtype = DTYPES["float32" if config.model.dtype == "auto" else config.model.dtype]
        opened = open_base(path, dtype)
        if isinstance(opened, Run):
            opened.check_draws()
    return Adaptation(config, opened, adapted.adapter(c.adapter, opened.pipeline, NAME))


def check_base(config: ConfigDict, workdir: str) -> None:
    """Raises ValueError where an adapter's run that goes on was begun with other weights than those
    in config.model.path."""
    if not is_adapted(config) or config.train.accept_changes:
        return
    if not workdirs.steps(workdir) or not is_run(workdir):
        return
    path, before = config.model.path, description.read(workdir).fields
    with field(f"config.model.path={path!r}"):
        if before.get("base") != adapted.fingerprint(path):
            raise ValueError(
                f"{workdir} holds {before.get('adapter')}, trained for the model in "
                f"{before.get('path')}, and the weights here are others now. Choose another "
                "workdir, or go on all the same: --config.train.accept_changes=True"
            )


def resolve(config: ConfigDict, workdir: str) -> None:
    """Sets the autoencoder of config.data to the model's, and a cache for its latents."""
    if not is_adapted(config) or config.data.autoencoder:
        return
    opened, path = make(config).opened, config.model.path
    while getattr(opened, "base", None) is not None:  # the run of an adapter has its base's
        path, opened = opened.description.fields["path"], opened.base
    known = getattr(opened, "description", None)
    if known is not None:
        config.data.autoencoder = known.autoencoder
    elif "vae" in opened.models:
        config.data.autoencoder = str(Path(path) / "vae")
    if config.data.autoencoder and not config.data.cache:
        config.data.cache = str(Path(workdir) / "latents")
