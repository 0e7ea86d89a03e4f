"""What training leaves besides checkpoints: pictures and figures, by what was trained."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from ml_collections import ConfigDict

from diffusion import pretrained
from diffusion.config import contents, drawing, judging, pretrained_network
from diffusion.config.experiment import Experiment
from diffusion.evaluation import figures, merits, reconstruction
from diffusion.evaluation.harness import Harness
from diffusion.evaluation.metrics.noisy_accuracy import accuracy_by_level
from diffusion.objectives.adapting import OWN
from diffusion.pipelines import adapter_export, gallery
from diffusion.runs import workdir as workdirs
from diffusion.specs import texts

EVALUATION = "evaluation.json"
LINES = 200
"""Points whose way is drawn."""


class Results(Protocol):
    """The results of one kind of run; ``trained`` are its averaged parameters."""

    def grid(self, trained: Any, path: Path) -> None:
        """A picture of how far training has come, into a PNG."""

    def finish(self, trained: Any, folder: Path) -> None:
        """Everything that the run's folder should have at the end."""


class Samples:
    """Of a denoiser: samples, trajectories, evaluation; of a fine-tuned one also the pipeline."""

    def __init__(self, experiment: Experiment):
        self._experiment, self._drawer = experiment, experiment.drawer
        self._given = contents.subjects(experiment.config)
        self._columns = experiment.config.samples.columns

    def grid(self, trained: Any, path: Path) -> None:
        """Samples of each class or caption."""
        pipeline = self._drawer.pipeline
        count = gallery.grid_size(pipeline, self._columns, self._given)
        params, config = self._experiment.params(trained), self._experiment.config
        drawn = contents.samples(config, self._drawer, params, count)
        real = self._experiment.held_out
        x, subjects = drawn.draw(0, count), drawn.subjects
        gallery.save_grid(path, pipeline, x, subjects, self._columns, real)
        hints = self._drawer.given.get("hint")
        if hints is not None:
            shown = hints[np.arange(count) % len(hints)]
            grid = figures.image_grid(2 * shown - 1, self._columns)
            figures.save_png(path.with_name(f"{path.stem}_hints.png"), grid)

    def finish(self, trained: Any, folder: Path) -> None:
        """loss.png, samples.png, trajectory.png, trajectory.gif, evaluation.json, pipeline/."""
        experiment, drawer = self._experiment, self._drawer
        config, params = experiment.config, experiment.params(trained)
        made = experiment.adaptation
        if made is not None:
            own = made.base, made.opened.shapes, made.adapter, trained[OWN]
            if (written := adapter_export.save(folder, *own)) is not None:
                print(f"{written}: the adapter alone, as other software reads it")
        elif pretrained_network.is_pretrained(config):
            pretrained_network.export(config, params, folder / "pipeline")
        _loss_curve(experiment, folder)
        self.grid(trained, folder / "samples.png")
        few = self._given or drawer.pipeline.conditioner.suggestions
        count = min(10, len(few) or 10) if experiment.train.view == "images" else LINES
        chosen = drawer.subjects(count, self._given)
        gallery.save_trajectory(folder, drawer, params, chosen, contents.negative(config))
        data = judging.split(config, experiment.train, experiment.held_out)
        made = judging.make(config, drawer.pipeline, lambda: data)
        if made.metrics:
            captions = tuple(dict.fromkeys(data.held_out.captions))
            count = config.evaluation.count
            samples = contents.samples(config, drawer, params, count, captions)
            result = made.evaluate(samples, params, shard=config.evaluation.shard, folder=folder)
            settings = drawing.settings(config, drawer.pipeline, config.train.steps)
            write_evaluation(folder, result, judged(config, settings, made))
        else:  # that of fewer steps is not this model's
            (folder / EVALUATION).unlink(missing_ok=True)


class Reconstructions:
    """Of an autoencoder: reconstructions, and the model as diffusers saves it."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment

    def grid(self, trained: Any, path: Path) -> None:
        """Held-out images, each above its reconstruction."""
        e = self._experiment
        columns = e.config.samples.columns
        reconstruction.save_grid(path, e.objective, trained, e.held_out, columns)

    def finish(self, trained: Any, folder: Path) -> None:
        """loss.png, reconstructions.png, evaluation.json and ``autoencoder/``.

        The last is the network as diffusers saves it, with a ``scaling_factor`` that gives latents
        a standard deviation of 1: what config.data.autoencoder takes.
        """
        e = self._experiment
        _loss_curve(e, folder)
        self.grid(trained, folder / "reconstructions.png")
        result = reconstruction.measure(e.objective, trained, e.train, e.held_out)
        write_evaluation(folder, result, {"step": e.config.train.steps})
        net = e.objective.network.clone(scaling_factor=result["scaling_factor"])
        pretrained.save(folder / "autoencoder", net, trained["network"])


class Accuracy:
    """Of a classifier of noised examples: how often it is right, by noise level."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment

    def grid(self, trained: Any, path: Path) -> None:
        """Nothing: a classifier draws no pictures."""

    def finish(self, trained: Any, folder: Path) -> None:
        """loss.png and evaluation.json."""
        e = self._experiment
        _loss_curve(e, folder)
        levels = accuracy_by_level(e.objective, trained, e.held_out)
        print(f"on {len(e.held_out)} held-out examples, by noise level:")
        for level in levels:
            print(
                "  t {t:5.2f}  sigma/alpha {sigma_over_alpha:9.3g}  accuracy {accuracy:6.1%}  "
                "cross-entropy {cross_entropy:.3f}".format(**level)
            )
        result = {"levels": levels, "num_held_out": len(e.held_out)}
        write_evaluation(folder, result, {"step": e.config.train.steps})


def of(experiment: Experiment) -> Results:
    """The results of an experiment."""
    kinds = {"autoencoding": Reconstructions, "classification": Accuracy}
    return kinds.get(experiment.config.objective.name, Samples)(experiment)


def judged(config: ConfigDict, samples: Mapping[str, Any], made: Harness) -> dict[str, Any]:
    """What an evaluation depends on: the samples' settings, the metrics and the real examples."""
    c, data = config.evaluation, config.data.to_dict()
    for name in ("threads", "workers", "prefetch"):
        data.pop(name)
    own = {"count": c.count, "metrics": texts(c.metrics)}
    own |= {"features": c.features, "reference": c.reference}
    return {**samples, "evaluation": own} | ({"data": data} if made.uses_data else {})


def write_evaluation(folder: Path, result: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Writes evaluation.json, with the settings that it is of, and prints the main figures."""
    text = json.dumps({"settings": settings, **result}, indent=2, default=_plain)
    workdirs.write_text(folder / EVALUATION, text + "\n")
    print("\n".join(merits.lines(result)))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, (np.ndarray, np.generic)) else str(value)


def _loss_curve(experiment: Experiment, folder: Path) -> None:
    title = f"{experiment.train.name}: loss"
    figures.loss_curve(folder / "loss.png", folder / "metrics.jsonl", title=title)
