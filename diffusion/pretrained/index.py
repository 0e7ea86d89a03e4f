"""The index of a pipeline's folder, model_index.json, in the format of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from diffusion.pretrained import folders, hub, models

NAME = "model_index.json"


@dataclass(frozen=True)
class Index:
    """The parts of a pipeline.

    Attributes:
      kind: its class, such as "StableDiffusionPipeline".
      components: name of the component and its subfolder -> (library, class), or None if absent.
      options: its other settings, such as ``force_zeros_for_empty_prompt``.
    """

    kind: str
    components: Mapping[str, tuple[str, str] | None]
    options: Mapping[str, Any] = field(default_factory=dict)


def read_index(folder: str | Path) -> Index:
    """The index of a pipeline's folder.

    Raises:
      FileNotFoundError: if there is none.
      ValueError: if it is damaged.
    """
    path = Path(folder) / NAME
    if not path.is_file() and (path.parent / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds a model, not a pipeline: no {NAME}")
    content = folders.read_json(path)
    kind = content.pop("_class_name", None)
    if not isinstance(kind, str):
        raise ValueError(f"{path}: _class_name: the pipeline's class expected, got {kind!r}")
    components, options = {}, {}
    for name, value in content.items():
        if isinstance(value, list) and len(value) == 2 and _strings(value):
            components[name] = None if value[1] is None else (str(value[0]), value[1])
        elif not name.startswith("_"):
            options[name] = value
    return Index(kind, components, options)


def save_index(folder: str | Path, index: Index) -> None:
    """Writes the index of a pipeline, whose components lie in subfolders of ``folder``.

    Raises:
      ValueError: if a component's subfolder is not there.
    """
    folder = Path(folder)
    absent = [
        name for name, kind in index.components.items() if kind and not (folder / name).is_dir()
    ]
    if absent:
        raise ValueError(f"{folder}: no subfolder for the components {', '.join(absent)}")
    content = {"_class_name": index.kind, **index.options}
    content |= {name: list(kind or (None, None)) for name, kind in index.components.items()}
    folders.write_json(folder / NAME, content)


def nbytes(
    path_or_id: str | Path,
    *,
    revision: str | None = None,
    dtype: DTypeLike = jnp.float32,
) -> dict[str, int]:
    """Bytes of the parameters in a dtype, by component, from the configs alone.

    Components without weights, and those that this project does not run (safety checkers), are
    left out.
    """
    folder = hub.locate(path_or_id, revision=revision, weights=False)
    return {
        name: models.open_model(folder, name, with_weights=False).nbytes(dtype)
        for name, kind in read_index(folder).components.items()
        if kind is not None and kind[1] in models.CLASSES
    }


def _strings(values: list) -> bool:
    return all(value is None or isinstance(value, str) for value in values)
