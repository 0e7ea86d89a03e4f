"""Model folders as diffusers and transformers save them: config.json and (sharded) safetensors.

A model's weights lie in ``BASE.safetensors``, or in shards that ``BASE.safetensors.index.json``
names; BASE is ``diffusion_pytorch_model`` or ``model``. A variant (``fp16``, ``bf16``, ``ema``,
...) is another set of weights in the same folder: ``BASE.fp16.safetensors``, shards
``BASE.fp16-00001-of-00002.safetensors`` with ``BASE.safetensors.index.fp16.json``, formerly
``BASE-00001-of-00002.fp16.safetensors`` with ``BASE.safetensors.fp16.index.json``.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import ExitStack
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from diffusion.pretrained import files

DIFFUSERS = "diffusion_pytorch_model"
TRANSFORMERS = "model"
_SHARD = r"-\d{5}-of-\d{5}"


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's object."""
    if not path.is_file():
        raise FileNotFoundError(f"no such file: {path}")
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        what = "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else error
        raise ValueError(f"{path} is not JSON: {what}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, found {content!r:.60}")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as diffusers does; it appears under its name only when complete."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    os.replace(partial, path)


def open_folder(folder: str | Path, variant: str | None = None) -> dict[str, files.Tensor]:
    """The tensors of a model folder, none of them read yet.

    Every shard's header is read and checked against the index. ``variant`` is the set of weights,
    e.g. 'fp16', or None for the one without a name.

    Raises:
      FileNotFoundError: without the folder, its weights, the variant, or a shard.
      ValueError: for pickles only, a damaged file, or an index that disagrees with its shards.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such folder: {folder}")
    for base in (DIFFUSERS, TRANSFORMERS):
        single = [folder / single_name(base, variant)]
        indices = [folder / name for name in index_names(base, variant)]
        # If there are both, each library has its own preference.
        for path in (*indices, *single) if base == DIFFUSERS else (*single, *indices):
            if path.is_file():
                return files.open_file(path) if path in single else _open_shards(path)
    raise _no_weights(folder, variant)


def single_name(base: str, variant: str | None) -> str:
    """The name of unsharded weights."""
    return f"{base}.{variant}.safetensors" if variant else f"{base}.safetensors"


def index_names(base: str, variant: str | None) -> list[str]:
    """The names that an index may have, the current one first."""
    if not variant:
        return [f"{base}.safetensors.index.json"]
    return [f"{base}.safetensors.index.{variant}.json", f"{base}.safetensors.{variant}.index.json"]


def variants(folder: str | Path) -> set[str | None]:
    """The variants that a folder holds; None stands for the weights without a name."""
    found = set()
    name = rf"(?:{DIFFUSERS}|{TRANSFORMERS})"
    shard = rf"(?:{_SHARD})?"
    for path in Path(folder).glob("*.safetensors"):
        match = re.fullmatch(rf"{name}{shard}(?:\.([\w-]+?))?{shard}\.safetensors", path.name)
        if match:
            found.add(match.group(1))
    return found


def _open_shards(index: Path) -> dict[str, files.Tensor]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map: key -> file expected, got {weight_map!r:.80}")
    shards = sorted({str(name) for name in weight_map.values()})
    outside = [name for name in shards if Path(name).name != name]
    if outside:
        raise ValueError(f"{index}: weight_map: {outside[0]!r} is not a file in its folder")
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index.parent}: {len(missing)} of {len(shards)} shards named by {index.name} are"
            f" missing: {_some(missing)}"
        )
    tensors: dict[str, files.Tensor] = {}
    for name in shards:
        held = files.open_file(index.parent / name)
        named = {key for key, shard in weight_map.items() if shard == name}
        if named != set(held):
            lost, extra = sorted(named - set(held)), sorted(set(held) - named)
            raise ValueError(
                f"{index.parent / name} disagrees with {index.name}:"
                f" {len(lost)} named but not held ({_some(lost)}),"
                f" {len(extra)} held but not named ({_some(extra)})"
            )
        tensors |= held
    return tensors


def _no_weights(folder: Path, variant: str | None) -> Exception:
    held = variants(folder)
    pickles = sorted(path for path in folder.iterdir() if path.suffix in files.PICKLES)
    missing = f"weights of variant {variant!r}" if variant else "weights without a variant"
    if variant in held:
        return FileNotFoundError(f"{folder} holds shards, but not their index.json")
    if held:
        names = ", ".join(sorted(repr(name) for name in held))
        return FileNotFoundError(f"{folder} holds no {missing}; it holds variant={names}")
    if pickles:
        return files.refuse_pickle(pickles[0])
    names = f"{single_name(DIFFUSERS, variant)} or {single_name(TRANSFORMERS, variant)}"
    others = sorted(path.name for path in folder.iterdir())
    return FileNotFoundError(f"{folder} holds no {names}; it holds: {_some(others) or 'nothing'}")


def write_folder(
    folder: str | Path,
    base: str,
    tensors: files.Tensors,
    *,
    max_shard_bytes: float = 10e9,
    variant: str | None = None,
) -> None:
    """Writes a model's weights into a folder, sharded where they are large.

    At most one tensor is in memory at a time. All files are complete before the first gets its
    name, and the index gets its name last. So an interrupted call leaves either the old weights or
    a folder that ``open_folder`` refuses. Earlier weights of the same base and variant are
    replaced, whatever their number of shards.

    Args:
      folder: made if missing; an existing folder must be empty or a model's.
      base: ``DIFFUSERS`` or ``TRANSFORMERS``.
      tensors: key -> tensor, in the order in which they fill the shards.
      max_shard_bytes: a larger tensor has a shard of its own.
      variant: another name, e.g. 'fp16'.
    """
    folder = check_folder(folder)
    if max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes: a positive number expected, got {max_shard_bytes}")
    if variant is not None and not re.fullmatch(r"[\w-]+", variant):
        raise ValueError(f"variant: letters, digits, _ and - expected, got {variant!r}")
    shards = split(tensors, max_shard_bytes)
    stem = single_name(base, variant).removesuffix(".safetensors")
    names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    names = [f"{stem}.safetensors"] if len(shards) == 1 else names
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        for name, keys in zip(names, shards):
            part = {key: tensors[key] for key in keys}
            stack.enter_context(files.written(folder / name, part, files.PYTORCH))
        for path in _former(folder, base, variant):
            if path.name not in names:
                path.unlink()
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
            "weight_map": {key: name for name, keys in zip(names, shards) for key in keys},
        }
        write_json(folder / index_names(base, variant)[0], index)


def split(tensors: files.Tensors, max_bytes: float) -> list[list[str]]:
    """Keys by shard, in order; a shard ends if the next tensor would not fit."""
    shards: list[list[str]] = [[]]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(key)
        size += tensor.nbytes
    return shards


def check_folder(folder: str | Path) -> Path:
    """The folder, if a model may be written there: new, empty, or a model's already."""
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; a model is saved into a folder")
    held = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if held and "config.json" not in held and not variants(folder):
        raise ValueError(
            f"{folder} is not empty and not a model's folder (it holds {_some(held)});"
            " choose a new folder"
        )
    return folder


def _former(folder: Path, base: str, variant: str | None) -> list[Path]:
    """The indices and weights of one variant; indices come first, so none outlives its shards."""
    dotted = rf"\.{re.escape(variant)}" if variant else ""
    shards = rf"{base}(?:{dotted}(?:{_SHARD})?|{_SHARD}{dotted})\.safetensors"
    indices = [folder / name for name in index_names(base, variant)]
    weights = [path for path in folder.iterdir() if re.fullmatch(shards, path.name)]
    return [path for path in indices if path.is_file()] + weights


def nearest(name: str, choices: Mapping | list) -> str:
    """`` (nearest: X)`` for messages, or nothing."""
    near = get_close_matches(name, list(choices), 1)
    return f" (nearest: {near[0]})" if near else ""


def _some(names: list[str], most: int = 5) -> str:
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest
