"""What main.py does with a config and a working directory: train, sample, evaluate."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from configs import base
from diffusion.data import tfds
from diffusion.evaluation import classifiers, figures
from diffusion.evaluation.evaluate import evaluate_points, evaluate_samples
from diffusion.evaluation.noisy_accuracy import accuracy_by_level
from diffusion.experiment import (
    autoencoding,
    averages,
    describe,
    finetuning,
    inspecting,
    judging,
    latents,
    learning,
    provenance,
    starting,
    sweeping,
)
from diffusion.experiment.build import Experiment, build
from diffusion.experiment.data import batches, make_images, stored
from diffusion.experiment.drawing import Drawer, visible
from diffusion.experiment.fields import field
from diffusion.objectives.autoencoding import Autoencoding
from diffusion.sampling.progress import Preview
from diffusion.training import parallel, processes, snapshots, tracking, validation
from diffusion.training import workdir as workdirs
from diffusion.training.logging import Logger
from diffusion.training.loop import Validate, fit
from diffusion.training.state import TrainState

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


def train(config: ConfigDict, workdir: str) -> None:
    """Trains (or goes on, or finds itself done), then draws, plots and evaluates.

    Leaves in ``workdir``: config.json, parameters.txt, checkpoints/, tensorboard/, metrics.jsonl,
    samples/ (a grid per ``train.sample_every`` steps), samples.png, trajectory.png, trajectory.gif,
    loss.png and, where samples can be judged, evaluation.json. For points: density.png instead of
    grids. For autoencoders: reconstructions.png instead of samples, and autoencoder/, as diffusers
    saves one. Of a fine-tuned model: pipeline/, likewise.

    Of several processes the first writes all this, draws and evaluates, on its own devices;
    ``workdir`` is a folder that all of them see.
    """
    began = time.perf_counter()
    if latents.wanted(config.data) and jax.process_count() == 1:
        latents.compute(config.data, partial(make_images, config.data))
    experiment = _build(config)
    _check_config(config, workdir, TRAINING)
    with workdirs.held(workdir):
        _train(experiment, Path(workdir), began)


def _train(experiment: Experiment, folder: Path, began: float) -> None:
    config, workdir = experiment.config, str(folder)
    first = jax.process_index() == 0
    if _finished(folder, config):
        print(
            f"{workdir}: already done, {config.train.steps} steps. More steps go on from there; "
            "--mode=sample draws, --mode=evaluate judges"
        )
        return
    described = describe.describe(experiment)
    layout = parallel.make(config.parallel)
    if first:
        print(describe.tell(experiment, described, folder, layout.shardings))
    drawer = Drawer(experiment) if experiment.guidance else None  # a classifier draws nothing
    reconstructs = isinstance(experiment.objective, Autoencoding)
    tracker = None
    if config.log.wandb and first:
        tracker = tracking.Tracker(workdir, config.log.wandb, config.to_dict())
    logger = Logger(workdir, tracker)

    def grid(state: TrainState, step: int) -> None:
        params = processes.local(state.ema["ema"])
        if not first:
            return
        if reconstructs:
            picture = autoencoding.picture(experiment, params)
        else:
            picture = _grid(drawer, drawer.draw(params, _grid_size(drawer)))
        (folder / "samples").mkdir(exist_ok=True)
        figures.save_png(folder / "samples" / f"step_{step:07d}.png", picture)
        logger.image("samples", picture, step)

    every, draws = config.train.sample_every, drawer or reconstructs
    hooks = [(every, grid)] if every and draws and len(experiment.train.shape) == 3 else []
    if config.train.snapshot_every:
        widths = config.train.snapshot_sigma_rel
        writer = snapshots.writer(workdir, config.train.snapshot_every, widths)
        hooks.append((config.train.snapshot_every, writer))
    about = provenance.about(config)

    def started(step: int) -> None:
        if first:
            workdirs.save_config(workdir, config.to_dict())
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
        initial_params=starting.initial(config, workdir),
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
        flops=described.training,
        peak=described.peak,
        logger=logger,
        parallel=config.parallel,
    )
    if tracker is not None:
        tracker.close()
    params = processes.local(state.ema["ema"])
    if not first:
        return
    if finetuning.wanted(config):
        finetuning.export(config, params, folder / "pipeline")
    if drawer:
        _pictures(drawer, params, folder)
        _evaluate(drawer, params, folder)
    elif reconstructs:
        autoencoding.finish(experiment, params, folder)
    else:
        _evaluate_classifier(experiment, params, folder)
    (folder / "done").write_text(f"{config.train.steps}\n")
    print(f"{time.perf_counter() - began:.0f} s in all; results in {folder}")


def cache(config: ConfigDict, workdir: str) -> None:
    """Computes latents and text embeddings into ``config.data.cache``, as training does at first.

    What was interrupted goes on; what is there already stays. ``workdir`` is not touched.
    """
    del workdir
    if not latents.wanted(config.data):
        raise ValueError(
            "nothing to cache: config.data.autoencoder and config.data.text_encoder are empty"
        )
    latents.compute(config.data, partial(make_images, config.data))
    print(f"cached in {config.data.cache}")


def inspect(config: ConfigDict, workdir: str) -> None:
    """Shows what training would see, in ``workdir/inspect.png``, and in numbers."""
    inspecting.inspect(config, Path(workdir))


def prepare(config: ConfigDict, workdir: str) -> None:
    """Writes the images of config.data as a TFDS set: that of ``workdir``'s name, in its parent.

    It is read by that name: ``--workdir=sets/flowers`` by ``--config.data.name=flowers
    --config.data.dir=sets``. Images keep their sizes. With config.data.on_error=skip damaged ones
    are left out.
    """
    folder, c = Path(workdir), config.data
    splits = {split: stored(c, split) for split in ("train", "test")}
    with field(f"--workdir={workdir}"):
        tfds.prepare(folder.name, folder.parent, splits, c.channels or splits["train"].shape[-1])
    examples = " and ".join(f"{len(source):,} ({split})" for split, source in splits.items())
    print(
        f"{examples} images in {folder}; read by --config.data.name={folder.name} "
        f"--config.data.dir={folder.parent}"
    )


def sample(config: ConfigDict, workdir: str) -> None:
    """Draws ``config.samples.count`` samples from the run's averaged parameters.

    Leaves in ``workdir/samples``: grid.png, one PNG per image with its label and seed in the
    metadata, and samples.npz with x [N, ...] as the model has it and label [N], of latents also
    image [N, H, W, 3], of captions caption [N]; with samples.gif trajectory.gif. With
    sampler.preview_every, preview_<batch>_<evaluation>.png appear meanwhile.
    """
    folder = Path(workdir) / "samples"
    drawer, params, _ = _restore(config, workdir, partial(_preview, config, folder))
    if len(drawer.experiment.train.shape) != 3:
        for field in ("samples.gif", "sampler.preview_every"):
            section, name = field.split(".")
            if value := config[section][name]:
                raise ValueError(f"config.{field}={value} shows images, and the data are points")
    folder.mkdir(exist_ok=True)
    for old in folder.glob("preview_*.png"):
        old.unlink()
    x, label = drawer.draw(params, config.samples.count)
    arrays = {"x": x, "label": label}
    if drawer.captions:
        arrays["caption"] = np.array([drawer.captions[k] for k in label])
    images = drawer.visible(x) if x.ndim == 4 else None
    if drawer.experiment.autoencoder is not None:
        arrays["image"] = images
    np.savez(folder / "samples.npz", **{k: v for k, v in arrays.items() if v is not None})
    if x.ndim == 2:
        figures.density_figure(folder / "density.png", drawer.experiment.held_out.all()["x"], x)
    else:
        figures.save_png(folder / "grid.png", _grid(drawer, (x, label)))
        settings = {k: str(v) for k, v in config.sampler.to_dict().items()}
        for i, image in enumerate(images):
            about = settings | {"index": str(i)}
            if label is not None:
                about["caption" if drawer.captions else "label"] = str(_name(drawer, label[i]))
            figures.save_png(folder / f"{i:06d}.png", figures.to_uint8(image), about)
    if config.samples.gif:
        columns = config.samples.columns
        path, _ = drawer.trajectory(params, min(len(x), columns**2))
        figures.trajectory_gif(folder / "trajectory.gif", drawer.visible(path), columns=columns)
    print(f"{len(x)} samples in {folder}")


def evaluate(config: ConfigDict, workdir: str) -> None:
    """Judges samples from the run's averaged parameters; writes ``workdir/evaluation.json``."""
    drawer, params, _ = _restore(config, workdir)
    if not _evaluate(drawer, params, Path(workdir)):
        raise ValueError(
            "nothing to judge samples with: set config.evaluation.classifier to digits_svc "
            "or lenet5 (with config.evaluation.weights), for a class-conditional model, or "
            "config.evaluation.likelihood to ode or bound, for any (captions need nothing)"
        )


def sweep(config: ConfigDict, workdir: str) -> None:
    """Judges ``config.sweep.solvers`` at ``config.sweep.evaluations``, all else being the config's.

    Leaves in ``workdir`` sweep.png, sweep.md and sweep.json. Points measured already are not
    measured again.
    """
    drawer, params, step = _restore(config, workdir)
    judge = _judge(drawer.experiment) if drawer.experiment.num_classes else None
    sweeping.sweep(drawer, params, step, Path(workdir), judge)


def learn(config: ConfigDict, workdir: str) -> None:
    """Learns few-step solvers for the run's model, as ``config.learn`` says."""
    drawer, params, _ = _restore(config, workdir)
    learning.learn(drawer, params, Path(workdir))


def _build(config: ConfigDict) -> Experiment:
    experiment = build(config)
    for note in experiment.notes:
        print(f"note: {note}")
    return experiment


def _restore(
    config: ConfigDict, workdir: str, preview: Preview | None = None
) -> tuple[Drawer, Any, int]:
    """The drawer, averaged parameters and training step of a run that this config describes."""
    _check_config(config, workdir, (*TRAINING, "train.*"))
    experiment = _build(config)
    params, step, text = averages.parameters(config, workdir)
    if experiment.guidance is None:
        raise ValueError(
            f"config.objective.name={config.objective.name!r} draws nothing; how well it does is "
            f"in {workdir}/evaluation.json"
        )
    print(f"{workdir}: {text}")
    return Drawer(experiment, preview), params, step


def _validation(experiment: Experiment, layout: parallel.Layout) -> Validate | None:
    c = experiment.config
    if not c.train.validate_every:
        return None
    function = validation.make(
        experiment.objective,
        experiment.held_out,
        count=c.train.validation_count,
        batch_size=c.train.batch_size // c.train.accumulate,
        seed=c.seed,
        layout=layout,
        frozen=experiment.frozen,
    )
    return c.train.validate_every, function


def _check_config(config: ConfigDict, workdir: str, changeable: Sequence[str]) -> None:
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


def _finished(folder: Path, config: ConfigDict) -> bool:
    done = folder / "done"
    return done.exists() and int(done.read_text()) >= config.train.steps


def _grid_size(drawer: Drawer) -> int:
    """A row per class or caption, if they are few."""
    columns = drawer.experiment.config.samples.columns
    rows = drawer.experiment.num_classes or len(drawer.captions)
    return columns * (rows if 0 < rows <= 20 else columns)


def _grid(drawer: Drawer, drawn: tuple[np.ndarray, np.ndarray | None]) -> np.ndarray:
    """One row per class, or as many rows as it takes."""
    x, label = drawn
    names = ()
    columns = drawer.experiment.config.samples.columns
    if label is not None:
        order = np.argsort(label, kind="stable")
        x, label = x[order], label[order]
        rows = label[::columns]
        if len(x) % columns == 0 and np.all(label.reshape(-1, columns) == rows[:, None]):
            names = [_name(drawer, row) for row in rows]
    return figures.image_grid(drawer.visible(x), columns, row_names=names)


def _name(drawer: Drawer, label: int) -> str:
    """The caption or the class of that number."""
    names = drawer.captions or drawer.experiment.train.class_names
    return names[label] if names else str(label)


def _preview(config: ConfigDict, folder: Path, batch: int, evaluation: int, x0: np.ndarray) -> None:
    """x_0_hat of a batch's first samples, after so many evaluations."""
    folder.mkdir(exist_ok=True)
    path = folder / f"preview_{batch:03d}_{evaluation:04d}.png"
    columns = config.samples.columns
    autoencoder = latents.autoencoder(config.data)
    shown = visible(x0[: columns**2], autoencoder)
    figures.save_png(path, figures.image_grid(shown, columns))


def _pictures(drawer: Drawer, params: Any, folder: Path) -> None:
    experiment = drawer.experiment
    figures.loss_curve(
        folder / "loss.png", folder / "metrics.jsonl", title=f"{experiment.train.name}: loss"
    )
    if len(experiment.train.shape) == 1:
        x, _ = drawer.draw(params, experiment.config.samples.count)
        path, _ = drawer.trajectory(params, 200)
        real = experiment.held_out.all()["x"][: len(x)]
        figures.density_figure(folder / "density.png", real, x, path)
        return
    drawn = drawer.draw(params, _grid_size(drawer))
    figures.save_png(folder / "samples.png", _grid(drawer, drawn))
    rows = min(10, experiment.num_classes or len(drawer.captions) or 10)
    path, label = drawer.trajectory(params, rows)
    names = [] if label is None else [_name(drawer, k) for k in label]
    figures.trajectory_strip(folder / "trajectory.png", drawer.visible(path), row_names=names)
    figures.trajectory_gif(folder / "trajectory.gif", drawer.visible(path), columns=path.shape[1])


def _evaluate(drawer: Drawer, params: Any, folder: Path) -> bool:
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
    elif experiment.guidance.num_classes and (judge := _judge(experiment)) is not None:
        x, label = drawer.draw(params, c.count)
        result = evaluate_samples(x, label, judge, experiment.train, experiment.held_out)
        print(
            "{classifier} recognises {recognised:.1%} of {num_samples} samples as the class asked "
            "for ({classifier_accuracy:.1%} of {num_held_out} held-out real ones)\n"
            "Fréchet distance in {frechet_features}: {frechet_half:.3f} to held-out real data "
            "({frechet_real_halves:.3f} between two halves of it; {frechet_half_size} each)".format(
                **result
            )
        )
    elif experiment.guidance.encode is not None:
        result = judging.follows_captions(drawer, params)
    if experiment.likelihood is not None:
        result["likelihood"] = judging.likelihood(experiment, params)
    if not result:
        return False
    (folder / "evaluation.json").write_text(json.dumps(result, indent=2) + "\n")
    return True


def _evaluate_classifier(experiment: Experiment, params: Any, folder: Path) -> None:
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


def _judge(experiment: Experiment) -> classifiers.Classifier | None:
    c = experiment.config.evaluation
    if c.classifier == "digits_svc":
        return classifiers.digits_svc()
    if c.classifier == "lenet5" and c.weights:
        return classifiers.measure(classifiers.lenet5(c.weights), experiment.held_out)
    return None
