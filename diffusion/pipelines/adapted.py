"""Runs of adapters as pipelines: the model that an adapter was trained for, with it merged in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax

from diffusion import specs
from diffusion.adapters import choices
from diffusion.adapters.adapter import Adapter
from diffusion.adapters.low_rank.deltas import Deltas
from diffusion.errors import field, wrong_types
from diffusion.objectives.adapting import OWN
from diffusion.pipelines import concepts, joint
from diffusion.pipelines.from_pretrained import EDITOR
from diffusion.pipelines.pipeline import Defaults, Params, Pipeline
from diffusion.pretrained import hub
from diffusion.runs import workdir as workdirs

CHOICES = choices.CHOICES | {"textual_inversion": concepts.textual_inversion}
"""The adapters that can be trained."""
NETWORK = "adapted"
"""What a description calls the network of such a run."""


def adapter(text: str, base: Pipeline, name: str = "adapter") -> Adapter:
    """The adapter of a spec such as "lora(rank=16)", for a model.

    Raises:
      ValueError: there is no such adapter, or an option is wrong; ``name`` is the field's.
    """
    with field(f"{name}={text!r}"), wrong_types():
        return specs.function(text, CHOICES, name, {"base": base}, filled=("base",))()


def pipeline(
    base: Pipeline, own: Adapter, defaults: Defaults, captions: Sequence[str] = ()
) -> Pipeline:
    """The base with the adapter's network, and with captions that it draws by default."""
    kind, edits = base.kind, getattr(own, "edits", False)
    if edits:
        if base.edits:
            raise ValueError("the model edits pictures already: full() trains it further")
        kind = EDITOR if kind == "StableDiffusionPipeline" else kind
    network = joint.image_part(own.network(joint.network(base)), joint.encoders(base) is not None)
    conditioner = base.conditioner
    if hasattr(own, "conditioner"):
        conditioner = own.conditioner(conditioner, base.network)
    if captions:
        conditioner = replace(conditioner, suggestions=tuple(captions))
    options = {"network": network, "conditioner": conditioner, "defaults": defaults}
    return replace(base, kind=kind, edits=edits or base.edits, **options)


def load(base: Pipeline, params: Params, own: Adapter, trained: Mapping[str, Any]) -> Params:
    """The parameters of ``pipeline(base, own)``, of the base's and what was trained."""
    merged = jax.jit(own.merge)(joint.params(base, params), trained[OWN])
    return {**params, **joint.parted(merged, joint.encoders(base) is not None)}


def deltas(base: Pipeline, own: Adapter, params: Any) -> Deltas | None:
    """What an adapter of weights adds to the base's parameters, by their paths in the pipeline;
    None of any other adapter."""
    if not hasattr(own, "deltas"):
        return None
    inside = joint.encoders(base) is not None
    return {joint.path(path, inside): d for path, d in own.deltas(params).items()}


def parts(base: Pipeline) -> partial:
    """Parameters of the joint network -> those of the pipeline."""
    return partial(joint.parted, has_encoders=joint.encoders(base) is not None)


def fingerprint(path: str) -> str:
    """A hash of a model's weights: of a run's newest checkpoint, or of all files of a folder."""
    steps = workdirs.steps(path) if Path(path).is_dir() else []
    root = Path(path) / workdirs.CHECKPOINTS / str(max(steps)) if steps else hub.locate(path)
    digest = hashlib.sha256()
    files = [root] if root.is_file() else sorted(root.rglob("*"))
    names = (".safetensors",) if not steps else ("manifest.json",)
    for file in files:
        if file.is_file() and file.name.endswith(names):
            digest.update(file.relative_to(root).as_posix().encode())
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()[:16]
