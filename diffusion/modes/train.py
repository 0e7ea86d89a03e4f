"""--mode=train: from a config to a trained model, its pictures and figures."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import jax
from ml_collections import ConfigDict

from diffusion import processes
from diffusion.config import (
    adaptation,
    class_pictures,
    contents,
    drawing,
    initialization,
    judging,
    latents,
    optimizer,
    ranges,
    results,
    summary,
)
from diffusion.config.data import batches, make_images
from diffusion.config.experiment import Experiment, build
from diffusion.evaluation import figures
from diffusion.pipelines import description
from diffusion.runs import snapshots
from diffusion.runs import workdir as workdirs
from diffusion.runs.logging import Logger, Tracker
from diffusion.specs import texts
from diffusion.training import parallel, validation
from diffusion.training.loop import Validate, fit
from diffusion.training.state import TrainState

# Fields that may differ from those that the run was started with.
FREE = (*drawing.FREE, "train.steps", "train.*_every", "train.keep", "train.keep_best")
FREE += ("train.best", "train.accept_changes", "train.max_skipped", "train.validation_*")
FREE += ("log.*", "profile.*")


def run(config: ConfigDict, workdir: str) -> None:
    """Trains (or goes on, or finds itself done), then draws, plots and evaluates.

    Leaves in ``workdir``: model.json (what the model is, so that it can be drawn from without
    config and data), config.json, starts.jsonl (config, code version and command of each start),
    parameters.txt, checkpoints/, snapshots/ (of averages, per ``train.snapshot_every`` steps),
    tensorboard/, metrics.jsonl, init_from.txt (with ``train.init_from``), grids/ (of samples, per
    ``train.sample_every`` steps), samples.png, trajectory.png, trajectory.gif, loss.png and, with
    metrics, evaluation.json. Of autoencoders: reconstructions.png instead of samples, and
    autoencoder/, as diffusers saves one. Of a fine-tuned model: pipeline/, likewise.

    Of several processes the first writes all this, draws and evaluates, on its own devices;
    ``workdir`` is a folder that all of them see.
    """
    began = time.perf_counter()
    ranges.check(config)
    adaptation.resolve(config, workdir)
    drawing.check(config, workdir, FREE)
    if _finished(Path(workdir), config):
        print(
            f"{workdir}: already done, {config.train.steps} steps. More steps go on from there; "
            "--mode=sample draws, --mode=evaluate judges"
        )
        return
    adaptation.check_base(config, workdir)
    if jax.process_count() == 1:
        class_pictures.draw_missing(config)
    if latents.needed(config.data) and jax.process_count() == 1:
        latents.compute(config.data, partial(make_images, config.data))
    experiment = build(config)
    for note in experiment.notes:
        print(f"note: {note}")
    if (done := workdirs.steps(workdir)) and (before := workdirs.read_config(workdir)):
        for note in optimizer.resumption_notes(config, ConfigDict(before), max(done)):
            print(f"note: {note}")
    with workdirs.held(workdir):
        _train(experiment, Path(workdir), began)


def _train(experiment: Experiment, folder: Path, began: float) -> None:
    config, workdir = experiment.config, str(folder)
    first = jax.process_index() == 0
    described = summary.describe(experiment)
    layout = parallel.make(config.parallel)
    if first:
        print(summary.text(experiment, described, folder, layout.shardings))
    product, tracker = results.of(experiment), None
    if config.log.wandb and first:
        tracker = Tracker(workdir, config.log.wandb, config.to_dict())
    logger = Logger(workdir, tracker)

    def grid(state: TrainState, step: int) -> None:
        trained = processes.local(state.ema["ema"])
        if not first:
            return
        path = folder / "grids" / f"step_{step:07d}.png"
        path.parent.mkdir(exist_ok=True)
        try:
            product.grid(trained, path)
        except FloatingPointError as error:  # training may yet recover
            print(f"note: no samples at step {step}: {error}")
        show(path, step)

    def show(path: Path, step: int) -> None:
        if path.exists():
            logger.image("samples", figures.read_png(path), step)

    hooks = [(config.train.sample_every, grid)] if config.train.sample_every else []
    if config.train.snapshot_every:
        widths = config.train.snapshot_sigma_rel
        writer = snapshots.writer(workdir, config.train.snapshot_every, widths)
        hooks.append((config.train.snapshot_every, writer))
    about = workdirs.about(config.to_dict())

    def started(step: int) -> None:
        if first:
            workdirs.save_config(workdir, config.to_dict())
            description.write(folder, experiment.description)
            workdirs.record_start(workdir, step, about)

    state = fit(
        objective=experiment.objective,
        optimizer=experiment.optimizer,
        emas=experiment.emas,
        batches=partial(
            batches,
            config,
            experiment.train,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        ),
        steps=config.train.steps,
        workdir=workdir,
        seed=config.seed,
        frozen=experiment.frozen,
        initial_params=initialization.initial(
            config, workdir, experiment.adaptation and experiment.adaptation.initial()
        ),
        accumulate=config.train.accumulate,
        log_every=config.train.log_every,
        checkpoint_every=config.train.checkpoint_every,
        keep=config.train.keep,
        keep_best=config.train.keep_best,
        best=config.train.best,
        about=about,
        started=started,
        hooks=hooks,
        validate=_validation(experiment, layout),
        max_skipped=config.train.max_skipped,
        peak=summary.peak(config),
        logger=logger,
        parallel=config.parallel,
    )
    trained = processes.local(state.ema["ema"])
    if not first:
        return
    product.finish(trained, folder)
    if not config.train.sample_every:
        for name in ("samples.png", "reconstructions.png"):
            show(folder / name, config.train.steps)
    logger.close()
    if tracker is not None:
        tracker.close()
    (folder / "done").write_text(f"{config.train.steps}\n")
    print(f"{time.perf_counter() - began:.0f} s in all; results in {folder}")


def _validation(experiment: Experiment, layout: parallel.Layout) -> Validate | None:
    c = experiment.config
    if not c.train.validate_every:
        return None
    metrics = _validation_metrics(experiment)
    function = validation.make(
        experiment.objective,
        experiment.held_out,
        count=c.train.validation_count,
        batch_size=c.train.batch_size // c.train.accumulate,
        seed=c.seed,
        layout=layout,
        frozen=experiment.frozen,
    )

    def validate(state: TrainState, step: int) -> dict[str, float]:
        return function(state, step) | metrics(state)

    return c.train.validate_every, validate


def _validation_metrics(experiment: Experiment) -> Callable[[TrainState], dict[str, float]]:
    """Figures of samples of the average, by ``config.train.validation_metrics``.

    Of several processes the first has them; it alone chooses checkpoints.
    """
    c, drawer = experiment.config, experiment.drawer
    chosen, name = c.train.validation_metrics, "config.train.validation_metrics"
    if not texts(chosen):
        return lambda state: {}
    data = judging.split(c, experiment.train, experiment.held_out)
    made = judging.make(c, drawer.pipeline, lambda: data, chosen, name, reference="validation")
    captions = tuple(dict.fromkeys(data.validation.captions))

    def measure(state: TrainState) -> dict[str, float]:
        trained = processes.local(state.ema["ema"])
        if jax.process_index() != 0:
            return {}
        params = experiment.params(trained)
        samples = contents.samples(c, drawer, params, c.train.validation_samples, captions)
        try:
            figures = made.evaluate(samples, params)
        except FloatingPointError as error:  # training may yet recover
            print(f"note: no validation metrics: {error}")
            return {}
        return {name: figure for name, figure in figures.items() if isinstance(figure, float)}

    return measure


def _finished(folder: Path, config: ConfigDict) -> bool:
    done = folder / "done"
    if not done.exists() or not workdirs.steps(folder):
        return False
    try:
        return int(done.read_text()) >= config.train.steps
    except ValueError:
        raise ValueError(
            f"{done} is damaged: expected a number, the steps that are done. Remove it, and the "
            "same command finds out anew"
        ) from None
