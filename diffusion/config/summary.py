"""A summary of a run before it starts: parameters, operations, memory. Nothing is computed."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion.config.experiment import Experiment
from diffusion.objectives.objective import Context
from diffusion.training import flops
from diffusion.training.state import TrainState, create

ROWS = 15  # of the table on the terminal


@dataclasses.dataclass(frozen=True)
class Description:
    """What tracing a run reveals, without computing.

    Attributes:
      state: of ``jax.ShapeDtypeStruct``.
      forward: floating-point operations of the loss, of one example.
    """

    state: TrainState
    forward: int


def describe(experiment: Experiment) -> Description:
    """Traces initialisation and the loss of one example."""
    batch = {
        name: jax.ShapeDtypeStruct((1, *np.shape(value)), np.asarray(value).dtype)
        for name, value in experiment.train[0].items()
        if name != "x_std"  # the batches hold samples, without it
    }
    batch |= {name: jax.ShapeDtypeStruct(s, jnp.int32) for name, s in [("index", (1,))]}
    objective, key = experiment.objective, jax.random.key(0)

    def state(key, batch):
        return create(objective, experiment.optimizer, experiment.emas, key, batch)

    def loss(params, frozen, batch):
        context = Context(frozen, dict.fromkeys(experiment.emas, params))
        return objective.loss(params, context, batch, key)[0]

    shapes = jax.eval_shape(state, key, batch)
    args = shapes.params, experiment.frozen, batch
    return Description(shapes, flops.count(loss, *args))


def peak(config: ConfigDict) -> float | None:
    """FLOP/s that one device is capable of; None if it is not known."""
    kind = jax.local_devices()[0].device_kind
    return config.log.peak_tflops * 1e12 or flops.peak(kind, config.model.dtype)


def text(
    experiment: Experiment,
    description: Description,
    workdir: Path,
    shardings: Callable[[Any], Any],
) -> str:
    """The summary for the terminal; every parameter goes into ``workdir/parameters.txt``.

    ``shardings`` are those of the layout (``training.parallel``).
    """
    train, config, state = experiment.train, experiment.config, description.state
    devices, several = jax.devices(), jax.process_count()
    names, rows = _rows(state.params)
    count = sum(size for _, size in rows)
    table = [
        f"{name:<{max(map(len, names))}}  {shape!s:<20}  {size:>14,}  {size / count:>7.2%}"
        for name, (shape, size) in zip(names, rows)
    ]
    (workdir / "parameters.txt").write_text("\n".join([*table, f"{count:,} in all"]) + "\n")
    parts = {"parameters": state.params, "optimiser": state.opt_state, "averages": state.ema}
    if jax.tree.leaves(state.extra):
        parts["second network"] = state.extra
    sizes = {name: _bytes(tree, shardings) for name, tree in parts.items()}
    memory = ", ".join(f"{name} {_size(n)}" for name, n in sizes.items())
    lines = [
        f"{train.name}: {len(train):,} examples {train.shape}; {config.model.name}: "
        f"{count:,} parameters; {len(devices)} x {devices[0].device_kind}"
        + (f" in {several} processes" if several > 1 else ""),
        *_grouped({name: size for name, (_, size) in zip(names, rows)}, count),
        f"{_giga(description.forward)} GFLOP per image forward; on each device: {memory}",
    ]
    return "\n".join(lines)


def _rows(params: Any) -> tuple[list[str], list[tuple[tuple[int, ...], int]]]:
    leaves = jax.tree.leaves_with_path(params)
    names = ["/".join(str(getattr(key, "key", key)) for key in path) for path, _ in leaves]
    return names, [(leaf.shape, leaf.size) for _, leaf in leaves]


def _grouped(sizes: Mapping[str, int], count: int) -> list[str]:
    """Modules and their sizes, not more than ``ROWS``: of one name but for its number as one."""
    parts = {name: name.split("/") for name in sizes}
    depth = 1 + (len({path[0] for path in parts.values()}) == 1)
    groups: dict[str, int] = {}
    members: dict[str, set[str]] = {}
    exact = {"/".join(path[:depth]) for path in parts.values()}
    for name, size in sizes.items():
        module = "/".join(parts[name][:depth])
        label = module if len(exact) <= ROWS else re.sub(r"_\d+$", "_*", module)
        groups[label] = groups.get(label, 0) + size
        members.setdefault(label, set()).add(module)
    if len(groups) > ROWS:
        kept = sorted(groups, key=groups.get, reverse=True)[: ROWS - 1]
        rest = sum(size for name, size in groups.items() if name not in kept)
        groups = {name: size for name, size in groups.items() if name in kept}
        groups["others"] = rest
    labels = {
        name: f"{name} ({len(members[name])})" if len(members.get(name, "")) > 1 else name
        for name in groups
    }
    width = max(map(len, labels.values()))
    return [
        f"  {labels[name]:<{width}}  {size:>14,}  {size / count:>6.1%}"
        for name, size in groups.items()
    ]


def _bytes(tree: Any, shardings: Callable[[Any], Any]) -> int:
    """On each device."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(shardings(tree)))
    return sum(math.prod(at.shard_shape(x.shape)) * x.dtype.itemsize for x, at in pairs)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def _giga(count: int) -> str:
    return f"{count / 1e9:,.0f}" if count >= 1e11 else f"{count / 1e9:.3g}"
