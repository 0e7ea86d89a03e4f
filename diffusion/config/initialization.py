"""What training begins with: random parameters, a pretrained model's, or those of another run.

``config.train.init_from`` names another run; ``init_what`` says which of this model's parameters
are taken from there, by a regular expression that is searched for in their paths, such as
``network/down_0/block_0/conv1/kernel``. The others begin as they would without it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from ml_collections import ConfigDict

from diffusion.config import pretrained_network
from diffusion.errors import field
from diffusion.runs import restore
from diffusion.runs import workdir as workdirs

REPORT = "init_from.txt"

Initial = Callable[[Any, Callable[[], Any]], Any]


@dataclass(frozen=True)
class Loaded:
    """What became of a model's parameters, by path.

    Attributes:
      taken: those that the other run gave.
      missing: asked for, but the other run has none of that path.
      left_out: not asked for.
      unused: the other run's, that were not taken.
    """

    taken: tuple[str, ...]
    missing: tuple[str, ...]
    left_out: tuple[str, ...]
    unused: tuple[str, ...]

    def text(self, source: str) -> str:
        """The whole report."""
        groups = {
            f"taken from {source}": self.taken,
            "not there, so as without it": self.missing,
            "left out by config.train.init_what, so as without it": self.left_out,
            f"not used, of {source}": self.unused,
        }
        return "\n".join(
            f"{len(names)} {what}:\n" + "".join(f"  {name}\n" for name in names)
            for what, names in groups.items()
        )


def initial(config: ConfigDict, workdir: str, own: Initial | None = None) -> Initial | None:
    """Gives ``fit`` the parameters that training begins with; None: random ones.

    ``own`` gives those of an adapter without ``config.train.init_from``.
    """
    c, base = config.train, own or pretrained_network.initial(config)
    if not c.init_from:
        return base

    def load(shapes: Any, random: Callable[[], Any]) -> Any:
        root, step = source_of(c.init_from)
        with field(f"config.train.init_from={c.init_from!r}"):
            given, found = restore.restore_ema(root, c.init_average, step=step)
        own = (lambda: base(shapes, random)) if base else random
        params, report = merge(shapes, own, given, c.init_what)
        source = f"{root}, step {found} ({c.init_average})"
        if jax.process_index() == 0:
            workdirs.write_text(Path(workdir) / REPORT, report.text(source))
            print(_summary(report, source, workdir))
        return params

    return load


def merge(shapes: Any, own: Callable[[], Any], given: Any, what: str = "") -> tuple[Any, Loaded]:
    """Parameters of which some are given.

    Args:
      shapes: the model's parameters, as ``jax.ShapeDtypeStruct``.
      own: gives them as they would be otherwise; called if some are not given.
      given: another model's.
      what: regular expression, searched for in the paths of ``shapes``; empty for all.

    Raises:
      ValueError: a shape differs, or nothing is taken; the message names it.
    """
    ours = flatten_dict(shapes, sep="/")
    theirs = flatten_dict(given, sep="/")
    asked = [name for name in ours if re.search(what, name)]
    taken = [name for name in asked if name in theirs]
    if not taken:
        raise ValueError(_nothing(what, asked, list(ours), list(theirs)))
    wrong = [name for name in taken if theirs[name].shape != ours[name].shape]
    if wrong:
        raise ValueError(_shapes(wrong, ours, theirs))
    values = {name: theirs[name].astype(ours[name].dtype) for name in taken}
    if len(taken) < len(ours):
        values = flatten_dict(own(), sep="/") | values
    report = Loaded(
        taken=tuple(sorted(taken)),
        missing=tuple(sorted(set(asked) - set(taken))),
        left_out=tuple(sorted(set(ours) - set(asked))),
        unused=tuple(sorted(set(theirs) - set(taken))),
    )
    return unflatten_dict(values, sep="/"), report


def check(config: ConfigDict) -> None:
    """Raises ValueError for what can be wrong with the fields before anything is read."""
    c = config.train
    try:
        re.compile(c.init_what)
    except re.error as error:
        raise ValueError(
            f"config.train.init_what={c.init_what!r} is no regular expression: {error}"
        ) from None
    if c.init_what and not c.init_from:
        raise ValueError(
            f"config.train.init_what={c.init_what!r} needs config.train.init_from, a run's workdir"
        )
    if c.init_from and not workdirs.steps(source_of(c.init_from)[0]):
        raise ValueError(
            f"config.train.init_from={c.init_from!r} is not the workdir of a run with a "
            "checkpoint, nor a checkpoint, such as runs/digits/checkpoints/600"
        )


def source_of(path: str) -> tuple[Path, int | None]:
    """(workdir, step) of ``config.train.init_from``; None for the newest step."""
    folder = Path(path)
    if folder.name.isdigit() and folder.parent.name == workdirs.CHECKPOINTS:
        return folder.parents[1], int(folder.name)
    return folder, None


def _nothing(what: str, asked: list[str], ours: list[str], theirs: list[str]) -> str:
    if not asked:
        near = difflib.get_close_matches(what, ours, n=3, cutoff=0) or ours[:3]
        return (
            f"config.train.init_what={what!r} matches none of this model's parameters; the "
            f"nearest: {', '.join(near)}"
        )
    near = difflib.get_close_matches(asked[0], theirs, n=3, cutoff=0)
    return (
        f"config.train.init_from has none of the {len(asked)} parameters asked for; instead of "
        f"{asked[0]} it has {', '.join(near)}"
    )


def _shapes(wrong: list[str], ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> str:
    lines = [f"  {n}: {theirs[n].shape} there, {ours[n].shape} here" for n in wrong[:10]]
    if len(wrong) > 10:
        lines.append(f"  and {len(wrong) - 10} more")
    return (
        "config.train.init_from has other shapes:\n" + "\n".join(lines) + "\n"
        "Leave them out with config.train.init_what, a regular expression of what to take: "
        f"'^(?!.*{re.escape(wrong[0])})' takes all but the first"
    )


def _summary(report: Loaded, source: str, workdir: str) -> str:
    total = len(report.taken) + len(report.missing) + len(report.left_out)
    parts = [f"begins with {len(report.taken)} of {total} parameter arrays of {source}"]
    if report.missing:
        shown = ", ".join(report.missing[:3]) + (", ..." if len(report.missing) > 3 else "")
        parts.append(f"{len(report.missing)} are not there ({shown})")
    if report.left_out:
        parts.append(f"{len(report.left_out)} are left out")
    if report.unused:
        parts.append(f"{len(report.unused)} of its own are not used")
    return "; ".join(parts) + f". All of them: {Path(workdir) / REPORT}"
