"""The index of a pipeline's folder, model_index.json, in the format of diffusers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusion.pretrained import folders

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
    """The index of a pipeline's folder."""
    path = Path(folder) / NAME
    if not path.is_file() and (path.parent / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds a model, not a pipeline: no {NAME}")
    content = folders.read_json(path)
    kind = content.pop("_class_name", None)
    if not isinstance(kind, str):
        raise ValueError(f"{path}: _class_name: the pipeline's class expected, got {kind!r}")
    components, options = {}, {}
    for name, value in content.items():
        pair = isinstance(value, list) and len(value) == 2
        if pair and all(part is None or isinstance(part, str) for part in value):
            components[name] = None if value[1] is None else (str(value[0]), value[1])
        elif not name.startswith("_"):
            options[name] = value
    return Index(kind, components, options)


def save_index(folder: str | Path, index: Index) -> None:
    """Writes the index of a pipeline, whose components lie in subfolders of ``folder``."""
    folder = Path(folder)
    absent = [
        name for name, kind in index.components.items() if kind and not (folder / name).is_dir()
    ]
    if absent:
        raise ValueError(f"{folder}: no subfolder for the components {', '.join(absent)}")
    content = {"_class_name": index.kind, **index.options}
    content |= {name: list(kind or (None, None)) for name, kind in index.components.items()}
    folders.write_json(folder / NAME, content)
