"""An adapter of weights from a file or folder: LoRA and its relatives, in every known naming.

Each key is looked up alone, so that one file may mix namings. Every tensor is counted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion.adapters.low_rank.deltas import Deltas
from diffusion.pretrained import files, folders, hub
from diffusion.pretrained.adapters import bases, factors
from diffusion.pretrained.adapters.embeddings import Word
from diffusion.pretrained.adapters.factors import Part
from diffusion.pretrained.adapters.layers import Layer, Table

CONFIG = "adapter_config.json"
METADATA = "lora_adapter_metadata"
USUAL = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
_BUNDLED = re.compile(r"bundle_emb\.(.+)\.([^.]+)")
_ABSENT = {
    "text_encoder_2": r"lora_te2_.*|text_encoder_2\..*",
    "text_encoder": r"lora_te1?_.*|text_encoder\..*",
    "unet": r"lora_unet_.*|unet\..*",
}
"""Component -> how the names of its layers begin."""


@dataclass(frozen=True)
class Read:
    """What a file holds for a model.

    Attributes:
      deltas: by the paths of our parameters.
      unused: keys of tensors that belong to no layer of the model.
      absent: components that the file adapts and the model does not have -> one of the keys.
      words: new ones of prompts, whose embeddings are bundled with it.
      about: the file's metadata.
    """

    deltas: Deltas
    unused: tuple[str, ...]
    absent: Mapping[str, str]
    words: tuple[Word, ...]
    about: Mapping[str, str]


def find(path_or_id: str | Path) -> Path:
    """The file of an adapter: a file, the one in a folder, or in a repository on the hub.

    Raises:
      FileNotFoundError: there is none.
      ValueError: a folder holds several, or pickles alone.
    """
    path = Path(path_or_id).expanduser()
    if not path.exists():
        path = hub.adapter(str(path_or_id))
    if not path.is_dir():
        return path
    found = sorted(path.glob("*.safetensors"))
    chosen = [file for file in found if file.name in USUAL] or found
    if len(chosen) == 1:
        return chosen[0]
    if chosen:
        listed = ", ".join(file.name for file in chosen)
        raise ValueError(f"{path} holds several files; name one of them: {listed}")
    pickles = sorted(file for file in path.iterdir() if file.suffix in files.PICKLES)
    if pickles:
        raise files.refuse_pickle(pickles[0])
    raise FileNotFoundError(f"{path} holds no .safetensors file")


def read(path: Path, table: Table) -> Read:
    """What a safetensors file, found by ``find``, holds for a model with these layers.

    Raises:
      ValueError: the file is damaged or a pickle, holds no adapter of weights or one for another
        base, or tensors that do not fit the model or each other, or are not finite.
    """
    tensors, about = files.open_file(path), files.metadata(path)
    try:
        if what := bases.other(tensors):
            raise ValueError(f"this is {what}")
        bases.check(tensors, about, table.context)
        return _read(tensors, about, table, _settings(path, about))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read(
    tensors: files.Tensors, about: Mapping[str, str], table: Table, settings: _Settings
) -> Read:
    layers: dict[str, tuple[Layer, dict[str, Part]]] = {}
    unused, bundled = [], {}
    for key, tensor in tensors.items():
        if found := _BUNDLED.fullmatch(key):
            rows = np.atleast_2d(_values(key, tensor)).astype(np.float32)
            bundled.setdefault(found[1], {})[found[2]] = rows
            continue
        name, what = factors.split(key) or ("", "")
        layer = table.aliases.get(name)
        if layer is None:
            unused.append(key)
            continue
        parts = layers.setdefault(layer.peft, (layer, {}))[1]
        part = Part(key, _values(key, tensor))
        if what in parts and not np.array_equal(parts[what].values, part.values):
            raise ValueError(f"{parts[what].key} and {key} are the same, but not equal")
        parts[what] = part
    deltas = {}
    for layer, parts in layers.values():
        made = factors.deltas(parts, layer, settings.scale(layer))
        deltas |= made
        if not made:
            unused += [part.key for part in parts.values()]
    absent = {}
    for component in _ABSENT.keys() - {layer.component for layer in table.layers}:
        keys = [key for key in unused if re.fullmatch(_ABSENT[component], key)]
        if keys:
            absent[component] = keys[0]
            unused = [key for key in unused if key not in set(keys)]
    if not tensors:
        raise ValueError("it holds no tensors")
    if not deltas and not absent:
        shown = ", ".join(list(tensors)[:3])
        raise ValueError(f"none of its {len(tensors)} tensors fits this model: {shown}, ...")
    # In the order of the text encoders: clip_l, clip_g.
    words = (
        Word(t, tuple(own[k] for k in sorted(own, reverse=True))) for t, own in bundled.items()
    )
    return Read(deltas, tuple(unused), absent, tuple(words), about)


def _values(key: str, tensor: files.Tensor) -> np.ndarray:
    if not jnp.issubdtype(tensor.dtype, jnp.floating) and not key.endswith(".alpha"):
        raise ValueError(f"{key} is stored as {tensor.dtype}; expected floating point")
    values = tensor.read()
    if not np.isfinite(values.astype(np.float32)).all():
        raise ValueError(f"{key} holds values that are not finite (NaN or infinity)")
    return values


@dataclass(frozen=True)
class _Settings:
    """PEFT's, which say what alpha is where no tensor does: by component, or of all by ""."""

    fields: Mapping[str, Mapping[str, Any]]

    def scale(self, layer: Layer) -> Callable[[float, int | None], float]:
        """(alpha, or 0 for none, rank) -> alpha / rank, or alpha / sqrt(rank); 1 by default."""
        fields = self.fields.get(layer.component, self.fields.get("", {}))
        default = _own(fields, "alpha", layer, fields.get("lora_alpha", fields.get("alpha")))
        whole = 1.0  # of whole matrices, which only PEFT scales
        if default and fields.get("peft_type") == "LOKR":
            whole = default / (_own(fields, "rank", layer, fields.get("r")) or default)

        def scale(alpha: float, rank: int | None) -> float:
            if rank is None:
                return whole
            if alpha or not default:
                return alpha / rank if alpha else 1.0
            return default / (rank**0.5 if fields.get("use_rslora") else rank)

        return scale


def _own(fields: Mapping[str, Any], name: str, layer: Layer, default: Any) -> Any:
    """The number that the first pattern gives to a layer which it matches."""
    patterns = fields.get(f"{name}_pattern") or {}
    found = (p for p in patterns if re.match(rf"(.*\.)?({p})$", layer.name))
    return patterns.get(next(found, None), default)


def _settings(path: Path, about: Mapping[str, str]) -> _Settings:
    file, fields = path.with_name(CONFIG), {}
    try:
        if METADATA in about:
            for name, value in json.loads(about[METADATA]).items():
                component, _, own = name.partition(".")
                fields.setdefault(component, {})[own] = value
        elif file.is_file() and path.name in USUAL:
            fields[""] = folders.read_json(file)
        for own in fields.values():
            for name in ("alpha_pattern", "rank_pattern"):
                for pattern, number in (own.get(name) or {}).items():
                    re.compile(pattern)
                    float(number)
            for name in ("lora_alpha", "alpha", "r"):
                float(own.get(name) or 0)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        where = METADATA if METADATA in about else CONFIG
        raise ValueError(f"its {where} is damaged: {error}") from error
    return _Settings(fields)
