"""Judging a run: how likely data are, whether held-out captions are followed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from diffusion.config.experiment import Experiment
from diffusion.data import densities
from diffusion.data.sources import affordable
from diffusion.evaluation import classifiers, figures
from diffusion.evaluation.metrics import bits
from diffusion.evaluation.metrics.caption_gap import caption_gap
from diffusion.evaluation.metrics.nearest import nearest_distances
from diffusion.evaluation.metrics.noisy_accuracy import accuracy_by_level
from diffusion.evaluation.metrics.retrieval import retrieval
from diffusion.evaluation.samples import evaluate_points, evaluate_samples
from diffusion.modes.drawer import Drawer


def evaluate(drawer: Drawer, params: Any, folder: Path) -> bool:
    """Writes evaluation.json and prints its main figures; False if there is no judge."""
    experiment = drawer.experiment
    c = experiment.config.evaluation
    result = {}
    if len(experiment.train.shape) == 1:
        x, _ = drawer.draw(params, c.count)
        result = evaluate_points(x, experiment.config.data.density)
        print(
            "sliced Wasserstein distance {sliced_wasserstein:.4f} (real data among themselves "
            "{sliced_wasserstein_real:.4f})".format(**result)
        )
    elif experiment.guidance.num_classes and (judged := judge(experiment)) is not None:
        x, label = drawer.draw(params, c.count)
        result = evaluate_samples(x, label, judged, experiment.train, experiment.held_out)
        print(
            "{classifier} recognises {recognised:.1%} of {num_samples} samples as the class asked "
            "for ({classifier_accuracy:.1%} of {num_held_out} held-out real ones)\n"
            "Fréchet distance in {frechet_features}: {frechet_half:.3f} to held-out real data "
            "({frechet_real_halves:.3f} between two halves of it; {frechet_half_size} each)".format(
                **result
            )
        )
    elif experiment.guidance.encode is not None:
        result = follows_captions(drawer, params)
    if experiment.likelihood is not None:
        result["likelihood"] = likelihood(experiment, params)
    if not result:
        return False
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    return True


def classifier(experiment: Experiment, params: Any, folder: Path) -> None:
    """Writes evaluation.json, with the accuracy by noise level, and prints it."""
    figures.loss_curve(
        folder / "loss.png", folder / "metrics.jsonl", title=f"{experiment.train.name}: loss"
    )
    results = accuracy_by_level(experiment.objective, params, experiment.held_out)
    print(f"on {len(experiment.held_out)} held-out examples, by noise level:")
    for result in results:
        print(
            "  t {t:5.2f}  sigma/alpha {sigma_over_alpha:9.3g}  accuracy {accuracy:6.1%}  "
            "cross-entropy {cross_entropy:.3f}".format(**result)
        )
    result = {"levels": results, "num_held_out": len(experiment.held_out)}
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")


def judge(experiment: Experiment) -> classifiers.Classifier | None:
    """The classifier that config.evaluation asks for, if any."""
    c = experiment.config.evaluation
    if c.classifier == "digits_svc":
        return classifiers.digits_svc()
    if c.classifier == "lenet5" and c.weights:
        return classifiers.measure(classifiers.lenet5(c.weights), experiment.held_out)
    return None


def follows_captions(drawer: Drawer, params: Any) -> dict[str, Any]:
    """Whether held-out captions are followed: losses, retrieval, nearest training examples.

    Prints the main figures, and gives all, JSON-ready: "captions" as ``caption_gap``, "retrieval"
    as ``retrieval`` of pictures in pixels, with the median distances of samples, and of held-out
    examples, to the nearest training example, in what the model is trained on.
    """
    experiment = drawer.experiment
    held_out, train = (affordable(s) for s in (experiment.held_out, experiment.train))
    c = experiment.config.evaluation
    captions = list(dict.fromkeys(held_out.captions))
    if len(captions) < 2:
        print("note: fewer than two captions are held out (config.data.held_out): nothing to judge")
        return {}
    gap = caption_gap(experiment.objective, params, held_out)
    print(
        "loss on {count} held-out examples: {loss:.4f} with their captions, {loss_other:.4f} with "
        "others' (+{gap:.4f} +- {gap_ci:.4f}), {loss_empty:.4f} with none; {own_preferred:.1%} "
        "have the smaller loss with their own".format(**gap)
    )
    x, label = drawer.draw(params, c.count, captions=captions)
    real = held_out.all()["x"]
    asked = [captions[k] for k in label]
    found = retrieval(drawer.visible(x), asked, drawer.visible(real), held_out.captions)
    known = train.all()["x"]
    found["nearest_train"] = float(np.median(nearest_distances(x, known)))
    found["nearest_train_held_out"] = float(np.median(nearest_distances(real, known)))
    print(
        "of {captions} held-out captions, {first:.1%} of {pictures} samples are nearest to their "
        "own's pictures (by chance {first_by_chance:.1%}), {among_10:.1%} have it among the ten "
        "nearest ({among_10_by_chance:.1%})".format(**found)
    )
    return {"captions": gap, "retrieval": found}


def likelihood(experiment: Experiment, params: Any) -> dict[str, Any]:
    """Bits per dimension of held-out and training data, printed too."""
    c, source = experiment.config.evaluation, experiment.held_out
    splits = {"held_out": source, "train": experiment.train}
    result = bits.evaluate_bits(
        experiment.likelihood,
        experiment.objective.denoiser,
        experiment.objective.schedule,
        params,
        splits,
        count=c.likelihood_count,
        batch_size=experiment.config.sampler.batch_size,
        labels=experiment.num_classes > 0,
        seed=experiment.config.sampler.seed,
    )
    for name, numbers in result.items():
        line = "{}: {bits_per_dim:.4f} +- {standard_error:.4f} bits/dim".format(
            name.replace("_", "-"), **numbers
        )
        line += "" if source.levels else " ({nats:.4f} nats)".format(**numbers)
        if len(source.shape) == 1:
            index = bits.chosen_examples(
                splits[name], c.likelihood_count, experiment.config.sampler.seed
            )
            known = densities.log_density(
                experiment.config.data.density, splits[name].read(index)["x"]
            )
            if known is not None:
                numbers["nats_of_the_density"] = float(-known.mean())
                line += f"; the density itself {-known.mean():.4f} nats"
        print(line + " ({count} examples, {evaluations:.0f} evaluations each)".format(**numbers))
        if numbers["failed"]:
            print(f"note: {numbers['failed']} not solved within max_steps, and left out")
    given = {"estimator": c.likelihood, "levels": source.levels}
    return given | {"given_labels": experiment.num_classes > 0} | result
