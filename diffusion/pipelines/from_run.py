"""Trained runs as pipelines: a workdir knows its model, and needs neither config nor data.

opened = open_run("runs/digits")  # no parameters yet
pipeline, params = opened.pipeline, opened.load()
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from diffusion import pretrained
from diffusion.adapters.adapter import Adapter
from diffusion.pipelines import adapted, description
from diffusion.pipelines.extension import Attachment
from diffusion.pipelines.from_pretrained import Opened, open_pipeline
from diffusion.pipelines.pipeline import Params, Pipeline
from diffusion.runs import averages
from diffusion.runs import workdir as workdirs


@dataclass(frozen=True)
class Run:
    """A run whose parameters have not been read.

    Attributes:
      path: the workdir.
      description: what its model is.
      average: which average of the parameters, a spec of ``runs.averages``.
      checkpoint: "newest", "best" or a step.
      attached: what changes the parameters once they are read, in turn.
    """

    path: Path
    description: description.Description
    average: str = "ema"
    checkpoint: str = "newest"
    attached: tuple[Attachment, ...] = ()

    @cached_property
    def base(self) -> Opened | Run | None:
        """The model that an adapter was trained for; None of any other run.

        Raises:
          ValueError: it is not what it was then.
        """
        d = self.description
        if d.network != adapted.NETWORK:
            return None
        path = d.fields["path"]
        if adapted.fingerprint(path) != d.fields["base"]:
            raise ValueError(
                f"{self.path} holds {d.fields['adapter']}, trained for the model in {path}, whose "
                "weights are others now"
            )
        return open_base(path, description.DTYPES[d.dtype])

    @property
    def adapter(self) -> Adapter:
        """What was trained for ``base``."""
        return adapted.adapter(self.description.fields["adapter"], self.base.pipeline)

    @cached_property
    def pipeline(self) -> Pipeline:
        """Everything but the parameters.

        Raises:
          ValueError: something that the model needs is not where it was, or model.json is damaged.
        """
        try:
            if self.base is not None:
                d = self.description
                own = self.adapter, d.sampler, d.captions
                pipeline = adapted.pipeline(self.base.pipeline, *own)
            else:
                pipeline = description.pipeline(self.description)
        except description.DAMAGED as error:
            file = self.path / description.FILE
            raise ValueError(f"{file} is damaged: it does not describe a model") from error
        for attachment in self.attached:
            pipeline = attachment.pipeline(pipeline)
        return pipeline

    @property
    def name(self) -> str:
        """What pictures call the model."""
        return self.path.resolve().name

    @cached_property
    def restored(self) -> tuple[Params, int]:
        """What was trained, and the step that it is from."""
        params, step, text = averages.parameters(self.path, self.average, self.checkpoint)
        print(f"{self.path}: {text}")
        return params, step

    @property
    def shapes(self) -> Params:
        """Of the parameters of network and encoders, ``jax.ShapeDtypeStruct``s or arrays."""
        trained = self.restored[0]
        if self.base is None:
            return {"network": trained["network"]}

        def load(params: Params) -> Params:
            return adapted.load(self.base.pipeline, params, self.adapter, trained)

        return jax.eval_shape(load, self.base.shapes)

    def check_draws(self) -> None:
        """Raises ValueError unless the run's model draws samples."""
        kind = self.description.network
        if kind not in description.DRAWN:
            raise ValueError(
                f"a run of a model.name={kind!r} draws nothing; how well it does is in "
                f"{self.path}/evaluation.json"
                + (f", what others load is {self.path}/autoencoder" * (kind == "autoencoder"))
            )

    def attach(self, attachment: Attachment) -> Run:
        """With something attached."""
        return replace(self, attached=(*self.attached, attachment))

    def load(self, progress: bool = False) -> Params:
        """The parameters of the network, and of the autoencoder where there is one."""
        if self.base is None:
            params = {"network": self.restored[0]["network"]} | components(self.description)
        else:
            params, trained = self.base.load(progress), self.restored[0]
            params = adapted.load(self.base.pipeline, params, self.adapter, trained)
        for attachment in self.attached:
            params = attachment.load(params)
        return params


def is_run(path: str | Path) -> bool:
    """Whether ``path`` is the workdir of a run.

    Raises:
      ValueError: it is one of an older version of this project.
    """
    folder = Path(path)
    if (folder / description.FILE).exists():
        return True
    if workdirs.steps(folder):
        raise ValueError(
            f"{folder} holds a run of an older version of this project, without "
            f"{description.FILE}: this version cannot read it. Train it again, or use the version "
            "that its checkpoints name"
        )
    return False


def open_run(path: str | Path, *, average: str = "ema", checkpoint: str = "newest") -> Run:
    """The run in a workdir; ``average`` and ``checkpoint`` as ``Run``'s.

    Raises:
      FileNotFoundError: there is no run, or no (such) checkpoint.
      ValueError: it is damaged, or of an older version.
    """
    if not is_run(path):
        raise FileNotFoundError(f"{path} is not the workdir of a run: no {description.FILE}")
    return Run(Path(path), description.read(path), average, checkpoint)


def open_base(path: str | Path, dtype: DTypeLike = jnp.float32) -> Opened | Run:
    """What an adapter is trained for: a run's workdir, a folder as diffusers saves it, a hub id."""
    return open_run(path) if is_run(path) else open_pipeline(path, dtype=dtype)


def components(d: description.Description) -> dict[str, Any]:
    """Parameters of what is not trained: the autoencoder's."""
    if not d.autoencoder:
        return {}
    folder = description.located(d.autoencoder)
    return {"autoencoder": pretrained.load(folder, expected="AutoencoderKL").params}
