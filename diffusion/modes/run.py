"""Whether a config and a working directory belong together, and what a run has left there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ml_collections import ConfigDict

from configs import base
from diffusion.config import averages, terms
from diffusion.config.experiment import Experiment, build
from diffusion.modes.drawer import Drawer
from diffusion.runs import workdir as workdirs
from diffusion.sampling.progress import Preview

# Fields that may differ from those that a run was started with: what the parameters are does not
# depend on them.
DRAWING = ("parallel", "sampler.*", "samples.*", "evaluation.*", "sweep.*", "learn.*", "inspect.*")
DRAWING += ("data.threads", "data.workers", "data.prefetch")
TRAINING = (*DRAWING, "train.steps", "train.*_every", "train.keep", "train.keep_best")
TRAINING += (
    "train.best",
    "train.accept_changes",
    "train.max_skipped",
    "train.validation_count",
    "log.*",
    "profile.*",
)


def check(config: ConfigDict, workdir: str, changeable: Sequence[str]) -> None:
    """Refuses the workdir of another run, or says how it was another."""
    changes = workdirs.check_config(
        workdir,
        config.to_dict(),
        changeable=changeable,
        defaults=base.get_config().to_dict(),
        accept=config.train.accept_changes,
    )
    if changes:
        listed = "\n".join(changes)
        print(f"{workdir}: going on although its run had another configuration:\n{listed}")


def announced(config: ConfigDict) -> Experiment:
    """The experiment of a config, whose notes are printed."""
    experiment = build(config)
    for note in experiment.notes:
        print(f"note: {note}")
    return experiment


def restore(
    config: ConfigDict, workdir: str, preview: Preview | None = None
) -> tuple[Drawer, Any, int]:
    """The drawer, averaged parameters and training step of a run that this config describes."""
    check(config, workdir, (*TRAINING, "train.*"))
    experiment = announced(terms.for_drawing(config))
    params, step, text = averages.parameters(config, workdir)
    if experiment.guidance is None:
        raise ValueError(
            f"config.objective.name={config.objective.name!r} draws nothing; how well it does is "
            f"in {workdir}/evaluation.json"
        )
    print(f"{workdir}: {text}")
    return Drawer(experiment, preview), params, step
