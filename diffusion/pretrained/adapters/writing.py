"""Adapters of weights as files that diffusers, kohya's scripts and their relatives read."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.typing import DTypeLike

from diffusion.adapters.low_rank.deltas import (
    Decomposed,
    Delta,
    Deltas,
    Full,
    Hadamard,
    Kronecker,
    LowRank,
)
from diffusion.pretrained import files
from diffusion.pretrained.adapters.bases import KOHYA
from diffusion.pretrained.adapters.factors import rank
from diffusion.pretrained.adapters.layers import Layer, Table
from diffusion.pretrained.adapters.reading import METADATA
from diffusion.specs import unknown

Arrays = dict[str, np.ndarray]


def write(
    path: str | Path,
    deltas: Deltas,
    table: Table,
    *,
    naming: str | None = None,
    dtype: DTypeLike | None = None,
    about: Mapping[str, str] | None = None,
) -> None:
    """Writes a safetensors file that ``reading.read`` reads back to the bit.

    Args:
      path: of the file.
      deltas: of the model's parameters.
      table: the model's layers.
      naming: "peft", which diffusers reads and which has LoRA and DoRA alone, or "kohya", which
        web interfaces read and which has all kinds; None: the first that has all deltas' kinds.
      dtype: of the factors in the file; None: their own.
      about: further metadata.

    Raises:
      ValueError: a delta is of no layer of the model, of a kind that the naming does not have, not
        finite in this dtype, or without effect.
    """
    if naming is not None and naming not in NAMINGS:
        raise unknown("naming", naming, NAMINGS)
    places = {p: (layer, leaf) for layer in table.layers for leaf, p in layer.paths.items()}
    strange = [name for name in deltas if name not in places]
    if strange or not deltas:
        raise ValueError(
            f"{path}: {strange[0]} is no parameter of this model" if strange else "no deltas"
        )
    placed = [(*places[p], delta) for p, delta in deltas.items()]
    for layer, leaf, delta in placed:
        own = delta.delta if isinstance(delta, Decomposed) else delta
        if rank(own) and not float(own.scale):  # alpha = 0 stands for alpha = r in files
            raise ValueError(f"{path}: {layer.peft}.{leaf} has the scale 0, which no file can say")
    if naming is None:
        naming = "peft" if all(_plain(leaf, delta) for _, leaf, delta in placed) else "kohya"
    tensors, made = NAMINGS[naming](placed, table)
    for key, array in tensors.items():
        if dtype is not None and not key.endswith(".alpha"):
            with np.errstate(over="ignore"):
                tensors[key] = array.astype(dtype)
        if not np.isfinite(tensors[key].astype(np.float64)).all():
            raise ValueError(f"{path}: {key} would hold values that are not finite in this dtype")
    stored = {key: files.of_array(np.ascontiguousarray(a)) for key, a in tensors.items()}
    files.write_file(path, stored, {**files.PYTORCH, **made, **(about or {})})


Placed = list[tuple[Layer, str, Delta]]


def _peft(placed: Placed, table: Table) -> tuple[Arrays, dict[str, str]]:
    """PEFT's keys, and its configs as diffusers keeps them."""
    tensors: Arrays = {}
    configs: dict[str, list[tuple[str, int, float, bool]]] = {}
    for layer, leaf, delta in placed:
        low = delta.delta if isinstance(delta, Decomposed) else delta
        decomposed = low is not delta
        if not _plain(leaf, delta):
            raise ValueError(f"{layer.peft}.{leaf}: PEFT has no name for this kind; choose kohya")
        down, up = _shaped(low, layer)
        tensors |= {f"{layer.peft}.lora_A.weight": down, f"{layer.peft}.lora_B.weight": up}
        if decomposed:
            magnitude = np.asarray(delta.magnitude).reshape(-1)
            ones = (1,) * (down.ndim - 2)
            shape = (1, magnitude.size, *ones) if ones else (magnitude.size,)
            tensors[f"{layer.peft}.lora_magnitude_vector"] = magnitude.reshape(shape)
        own = float(low.scale) * len(down)  # exact, in float64
        # Versions of transformers differ in whether text_model is part of the name.
        name = layer.name.removeprefix("text_model.")
        configs.setdefault(layer.component, []).append((name, len(down), own, decomposed))
    about: dict[str, Any] = {}
    for component, rows in configs.items():
        names, ranks, alphas, dora = zip(*rows)
        r, alpha = (Counter(values).most_common(1)[0][0] for values in (ranks, alphas))
        config = {
            "r": r,
            "lora_alpha": _whole(alpha),
            "rank_pattern": {n: own for n, own in zip(names, ranks) if own != r},
            "alpha_pattern": {n: _whole(a) for n, a in zip(names, alphas) if a != alpha},
            "target_modules": sorted(names),
            "use_dora": any(dora),
        }
        about |= {f"{component}.{field}": value for field, value in config.items()}
    return tensors, {METADATA: json.dumps(about)}


def _plain(leaf: str, delta: Delta) -> bool:
    """Whether PEFT has names for a delta: LoRA of a weight, or DoRA with norms over all but out."""
    low = delta.delta if isinstance(delta, Decomposed) else delta
    lora = isinstance(low, LowRank) and low.mid is None and leaf == "weight"
    return lora and (low is delta or delta.magnitude.shape[1] == 1)


def _kohya(placed: Placed, table: Table) -> tuple[Arrays, dict[str, str]]:
    """The keys and metadata of kohya's scripts and LyCORIS."""
    tensors: Arrays = {}
    ranks, alphas, kinds = [], [], set()
    for layer, leaf, delta in placed:
        own = delta.delta if isinstance(delta, Decomposed) else delta
        kinds.add("locon" if getattr(own, "mid", None) is not None else type(own).__name__)
        parts = _PARTS[type(own)](own, layer, leaf)
        if isinstance(delta, Decomposed):
            parts["dora_scale"] = np.asarray(delta.magnitude)
            kinds.add("dora")
        if rank(own):
            parts["alpha"] = _alpha(float(own.scale), rank(own))
            ranks.append(rank(own))
            alphas.append(float(parts["alpha"]))
        tensors |= {f"{layer.kohya}.{part}": array for part, array in parts.items()}
    plain = kinds == {"LowRank"}
    about = {"ss_network_module": "networks.lora" if plain else "lycoris.kohya"}
    if ranks:
        about["ss_network_dim"] = str(Counter(ranks).most_common(1)[0][0])
        about["ss_network_alpha"] = str(Counter(alphas).most_common(1)[0][0])
    if not plain:
        algo = {"Hadamard": "loha", "Kronecker": "lokr", "Full": "full"}
        about["ss_network_args"] = json.dumps(
            {"algo": next((algo[kind] for kind in sorted(kinds) if kind in algo), "locon")}
        )
    if table.context in KOHYA:
        about["ss_base_model_version"] = KOHYA[table.context]
    return tensors, about


NAMINGS = {"peft": _peft, "kohya": _kohya}


def _low_rank(delta: LowRank, layer: Layer, leaf: str) -> Arrays:
    down, up = _shaped(delta, layer)
    mid = {} if delta.mid is None else {"lora_mid.weight": np.asarray(delta.mid)}
    return {"lora_down.weight": down, "lora_up.weight": up, **mid}


def _hadamard(delta: Hadamard, layer: Layer, leaf: str) -> Arrays:
    names = ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")
    given = {name: getattr(delta, name) for name in names}
    return {f"hada_{name}": np.asarray(a) for name, a in given.items() if a is not None}


def _kronecker(delta: Kronecker, layer: Layer, leaf: str) -> Arrays:
    parts: Arrays = {}
    for name in ("w1", "w2"):
        w = getattr(delta, name)
        if isinstance(w, tuple):
            names = (f"{name}_a", f"{name}_b", "t2")
            parts |= {f"lokr_{own}": np.asarray(a) for own, a in zip(names, w)}
        else:
            parts[f"lokr_{name}"] = np.asarray(w)
    if rank(delta) is None:
        parts["lokr_w1"] = _scaled(parts["lokr_w1"], delta.scale)
    return parts


def _full(delta: Full, layer: Layer, leaf: str) -> Arrays:
    norm = len(layer.shapes.get("weight", ())) == 1
    kinds = {"weight": "w_norm", "bias": "b_norm"} if norm else {"weight": "diff", "bias": "diff_b"}
    return {kinds[leaf]: _scaled(np.asarray(delta.diff), delta.scale)}


_PARTS: Mapping[type, Callable[[Any, Layer, str], Arrays]] = {
    LowRank: _low_rank,
    Hadamard: _hadamard,
    Kronecker: _kronecker,
    Full: _full,
}


def _shaped(delta: LowRank, layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """A and B with as many axes as the layer's weight has, as others expect."""
    down, up, shape = np.asarray(delta.down), np.asarray(delta.up), layer.shapes["weight"]
    ones = (1,) * (len(shape) - 2)
    kernel = ones if delta.mid is not None else shape[2:]
    return down.reshape(len(down), shape[1], *kernel), up.reshape(shape[0], -1, *ones)


def _scaled(array: np.ndarray, scale: Any) -> np.ndarray:
    return array if float(scale) == 1 else (float(scale) * array.astype(np.float32))


def _alpha(scale: float, rank: int) -> np.ndarray:
    """() float32 that gives ``scale`` when it is divided by the rank; float64 where none does."""
    alpha = scale * rank
    near = np.float32(alpha)
    for candidate in (near, *(np.nextafter(near, np.float32(to)) for to in (-np.inf, np.inf))):
        if np.float32(float(candidate) / rank) == np.float32(scale):
            return np.asarray(candidate, np.float32)
    return np.asarray(alpha, np.float64)


def _whole(number: float) -> float | int:
    return int(number) if number == int(number) else number
