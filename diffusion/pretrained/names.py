"""Name tables: the names and layouts of our parameters in the files of others.

A model has one table, ``Names``, for reading and writing. Bound to a model's parameters it is a
list of ``Match``es: some of our parameters and the tensors elsewhere that hold the same numbers,
nearly always one and one. ``from_tensors`` reads a checkpoint through them, ``to_tensors`` writes
one.

    names = Names(dotted("linear_1", "linear_2"))
    params = from_tensors(names, shapes, state_dict)
    state_dict = dict(to_tensors(names, params))
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import flax
import numpy as np

Arrays = Sequence[np.ndarray]


class Layout(NamedTuple):
    """Moves a match's numbers: ``join`` from the arrays elsewhere to ours, ``split`` back."""

    join: Callable[[Arrays], Arrays]
    split: Callable[[Arrays], Arrays]


def _each(read: Callable[[np.ndarray], np.ndarray], write: Callable[[np.ndarray], np.ndarray]):
    return Layout(
        lambda arrays: [read(a) for a in arrays], lambda arrays: [write(a) for a in arrays]
    )


PLAIN = _each(lambda a: a, lambda a: a)
KERNEL = _each(
    lambda a: np.moveaxis(a, (1, 0), (-2, -1)), lambda a: np.moveaxis(a, (-2, -1), (1, 0))
)
"""Kernels of matrices and convolutions: PyTorch's [out, in, ...] there, [..., in, out] here."""
POINTWISE = _each(lambda a: a[:, :, 0, 0].T, lambda a: a.T[:, :, None, None])
"""A 1 x 1 convolution there, a matrix here."""


def fused(parts: int) -> Layout:
    """Matrices [out, in] (or biases [out]) there, one kernel [in, parts * out] here."""
    return Layout(
        lambda arrays: [np.concatenate(arrays).T],
        lambda arrays: np.split(arrays[0].T, parts),
    )


def unfused(parts: int) -> Layout:
    """One matrix [parts * out, in] (or bias) there, as many kernels [in, out] here."""
    return Layout(
        lambda arrays: [a.T for a in np.split(arrays[0], parts)],
        lambda arrays: [np.concatenate([a.T for a in arrays])],
    )


def copies(count: int, layout: Layout) -> Layout:
    """The same tensor ``count`` times there, once here; those there must agree."""

    def join(arrays: Arrays) -> Arrays:
        if any(not np.array_equal(arrays[0], a) for a in arrays[1:]):
            raise ValueError(f"{count} tensors that should be copies of each other are not equal")
        return layout.join(arrays[:1])

    return Layout(join, lambda arrays: list(layout.split(arrays)) * count)


@dataclass(frozen=True)
class Row:
    """Parameters for which the general rule does not hold.

    Attributes:
      ours: a regular expression that matches the whole path of one parameter
        ("blocks_(\\d+)/attn/qkv/kernel"), then templates for the other ones ("blocks_\\1/...").
      theirs: templates of the keys.
      layout: of the numbers on both sides.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    layout: Layout


@dataclass(frozen=True)
class Names:
    """A name table.

    Attributes:
      rename: our module path "a_0/b" -> their prefix "a.0.b", for every parameter that is in no
        row. The parameter's own name follows: kernel, scale and embedding are "weight" there.
      rows: of all other parameters; the first row that matches counts.
      aliases: (regular expression, replacement) pairs that turn the spellings of older files into
        the table's keys; applied in order to every key that is read.
      ignored: regular expression for keys that hold no parameter.
    """

    rename: Callable[[str], str]
    rows: tuple[Row, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    ignored: str = r"(?!)"


class Match(NamedTuple):
    """Parameters of ours, by paths "a/b/kernel", and the tensors that hold the same numbers
    elsewhere, by keys "a.b.weight" and with their shapes there."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    layout: Layout


def dotted(*keep: str) -> Callable[[str], str]:
    """The rule "layers_0/fc" -> "layers.0.fc"; the parts ``keep`` ("linear_1") stay unchanged."""

    def rename(path: str) -> str:
        parts = path.split("/")
        return ".".join(p if p in keep else re.sub(r"_(\d+)$", r".\1", p) for p in parts)

    return rename


def substituted(*pairs: tuple[str, str]) -> Callable[[str], str]:
    """The rule that applies (regular expression, replacement) in order."""

    def rename(path: str) -> str:
        for pattern, replacement in pairs:
            path = re.sub(pattern, replacement, path)
        return path

    return rename


FORMER_ATTENTION = tuple(
    (rf"\.(attentions\.\d+)\.{old}\.", rf".\1.{new}.")
    for old, new in {
        "query": "to_q",
        "key": "to_k",
        "value": "to_v",
        "proj_attn": "to_out.0",
    }.items()
)
"""Aliases: what diffusers formerly called the parts of self-attention."""


def bind(names: Names, params: Any) -> list[Match]:
    """The table for these parameters (arrays or ``jax.ShapeDtypeStruct``s, nested dicts).

    Raises:
      ValueError: two parameters would have one key, or a row names a parameter there is not.
    """
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    matched: dict[str, tuple[tuple[str, ...], tuple[str, ...], Layout]] = {}
    for path in flat:
        found = next(filter(None, (_by_row(row, path) for row in names.rows)), None)
        if found is not None:
            absent = [p for p in found[0] if p not in flat]
            if absent:
                raise ValueError(f"the name table joins {path} with {absent}, which are not there")
            matched |= dict.fromkeys(found[0], found)
    for path in flat.keys() - matched.keys():
        matched[path] = _by_rule(names, path)
    # In the order of the parameters, which is the same in every run; each match once.
    ordered = dict.fromkeys(matched[path][:2] for path in flat)
    matches = []
    for ours, theirs in ordered:
        layout = matched[ours[0]][2]
        # Broadcast numbers take no memory, and most layouts make views of them.
        split = layout.split([np.broadcast_to(np.int8(0), flat[p].shape) for p in ours])
        matches.append(Match(ours, theirs, tuple(a.shape for a in split), layout))
    counts = Counter(key for match in matches for key in match.theirs)
    twice = [key for key, count in counts.items() if count > 1]
    if twice:
        raise ValueError(f"the name table gives several parameters the keys {twice}")
    return matches


def _by_row(row: Row, path: str) -> tuple[tuple[str, ...], tuple[str, ...], Layout] | None:
    found = re.fullmatch(row.ours[0], path)
    if found is None:
        return None
    others = tuple(found.expand(template) for template in row.ours[1:])
    return (path, *others), tuple(found.expand(template) for template in row.theirs), row.layout


def _by_rule(names: Names, path: str) -> tuple[tuple[str, ...], tuple[str, ...], Layout]:
    module, _, leaf = path.rpartition("/")
    key = {"kernel": "weight", "scale": "weight", "embedding": "weight"}.get(leaf, leaf)
    prefix = names.rename(module)
    layout = KERNEL if leaf == "kernel" else PLAIN
    return (path,), (f"{prefix}.{key}" if prefix else key,), layout


def canonical(names: Names, keys: Iterable[str]) -> dict[str, str]:
    """The table's key -> the stored key, for all keys that hold parameters."""
    return {key: stored[0] for key, stored in _spellings(names, keys).items()}


def _spellings(names: Names, keys: Iterable[str]) -> dict[str, list[str]]:
    """The table's key -> the stored keys, of which there may be several."""
    found: dict[str, list[str]] = {}
    for stored in keys:
        key = stored
        for pattern, replacement in names.aliases:
            key = re.sub(pattern, replacement, key)
        if not re.fullmatch(names.ignored, key):
            found.setdefault(key, []).append(stored)
    return found


def check(
    matches: Sequence[Match], shapes: Mapping[str, tuple[int, ...]], what: str = "checkpoint"
) -> None:
    """Raises ValueError unless all expected tensors are there, and no others.

    ``shapes`` are those of the tensors that there are, by the table's keys; ``what`` names their
    source. The error names at most ten tensors that are missing, unexpected or misshapen.
    """
    expected = {key: shape for match in matches for key, shape in zip(match.theirs, match.shapes)}
    missing = [key for key in expected if key not in shapes]
    unexpected = [key for key in shapes if key not in expected]
    misshapen = [
        f"{key} {tuple(shapes[key])}, expected {shape}"
        for key, shape in expected.items()
        if key in shapes and tuple(shapes[key]) != shape
    ]
    kinds = {"missing": missing, "unexpected": unexpected, "misshapen": misshapen}
    lines = [
        f"  {len(found)} {kind}: " + ", ".join(found[:10]) + (", ..." if len(found) > 10 else "")
        for kind, found in kinds.items()
        if found
    ]
    if missing and unexpected:
        near = get_close_matches(missing[0], unexpected, 1, 0.8)
        lines += [f"  (should {near[0]} be {missing[0]}?)"] if near else []
    if lines:
        raise ValueError(
            f"{what} does not hold this model: of {len(expected)} tensors,\n" + "\n".join(lines)
        )


def from_tensors(
    names: Names,
    params: Any,
    tensors: Mapping[str, Any],
    put: Callable[[np.ndarray], Any] = np.ascontiguousarray,
    what: str = "checkpoint",
) -> dict:
    """The parameters that a checkpoint holds.

    Args:
      names: the table.
      params: the model's, for their shapes: arrays or ``jax.ShapeDtypeStruct``s, nested dicts.
      tensors: by key, objects with a ``shape`` that ``numpy.asarray`` reads; each is read once, and
        none is kept.
      put: called with each parameter, a NumPy array in the dtype that was read.
      what: names the checkpoint in errors.

    Returns:
      Nested dicts of the results of ``put``.

    Raises:
      ValueError: see ``check``; nothing is read then.
    """
    matches, spellings = bind(names, params), _spellings(names, tensors)
    stored = {key: spelled[0] for key, spelled in spellings.items()}
    check(matches, {key: tuple(tensors[name].shape) for key, name in stored.items()}, what)
    for first, *others in spellings.values():
        for other in others:
            if not np.array_equal(np.asarray(tensors[first]), np.asarray(tensors[other])):
                raise ValueError(f"{what}: {first} and {other} are the same weight, but not equal")
    flat = dict.fromkeys(flax.traverse_util.flatten_dict(params, sep="/"))
    # The largest first: their temporary memory is needed while little else is in memory.
    for match in sorted(matches, key=lambda match: -sum(map(math.prod, match.shapes))):
        try:
            arrays = match.layout.join([np.asarray(tensors[stored[key]]) for key in match.theirs])
        except ValueError as error:
            raise ValueError(f"{what}: {match.theirs[0]}, ...: {error}") from None
        flat |= {path: put(array) for path, array in zip(match.ours, arrays)}
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def to_tensors(names: Names, params: Any) -> Iterator[tuple[str, np.ndarray]]:
    """(key, contiguous array) of every tensor in a checkpoint of these parameters."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    for match in bind(names, params):
        arrays = match.layout.split([np.asarray(flat[path]) for path in match.ours])
        yield from zip(match.theirs, map(np.ascontiguousarray, arrays))
