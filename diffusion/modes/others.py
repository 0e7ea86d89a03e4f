"""What main.py does besides training: sample, evaluate, sweep, learn; cache, inspect, prepare."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffusion.config import latents, ranges
from diffusion.config.data import make_images, stored
from diffusion.config.errors import field
from diffusion.data import tfds
from diffusion.evaluation import figures
from diffusion.modes import inspect as inspecting
from diffusion.modes import judge as judging
from diffusion.modes import learn as learning
from diffusion.modes import pictures, run
from diffusion.modes import sweep as sweeping


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
    ranges.check(config)
    inspecting.inspect(config, Path(workdir))


def prepare(config: ConfigDict, workdir: str) -> None:
    """Writes the images of config.data as a TFDS set: that of ``workdir``'s name, in its parent.

    It is read by that name: ``--workdir=sets/flowers`` by ``--config.data.name=flowers
    --config.data.dir=sets``. Images keep their sizes. With config.data.on_error=skip damaged ones
    are left out.
    """
    ranges.check(config)
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
    drawer, params, _ = run.restore(config, workdir, partial(pictures.preview, config, folder))
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
        figures.save_png(folder / "grid.png", pictures.grid(drawer, (x, label)))
        settings = {k: str(v) for k, v in config.sampler.to_dict().items()}
        settings["negative"] = str(config.samples.negative)
        for i, image in enumerate(images):
            about = settings | {"index": str(i)}
            if label is not None:
                about["caption" if drawer.captions else "label"] = str(
                    pictures.name(drawer, label[i])
                )
            figures.save_png(folder / f"{i:06d}.png", figures.to_uint8(image), about)
    if config.samples.gif:
        columns = config.samples.columns
        path, _ = drawer.trajectory(params, min(len(x), columns**2))
        figures.trajectory_gif(folder / "trajectory.gif", drawer.visible(path), columns=columns)
    print(f"{len(x)} samples in {folder}")


def evaluate(config: ConfigDict, workdir: str) -> None:
    """Judges samples from the run's averaged parameters; writes ``workdir/evaluation.json``."""
    drawer, params, _ = run.restore(config, workdir)
    if not judging.evaluate(drawer, params, Path(workdir)):
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
    drawer, params, step = run.restore(config, workdir)
    judge = judging.judge(drawer.experiment) if drawer.experiment.num_classes else None
    sweeping.sweep(drawer, params, step, Path(workdir), judge)


def learn(config: ConfigDict, workdir: str) -> None:
    """Learns few-step solvers for the run's model, as ``config.learn`` says."""
    drawer, params, _ = run.restore(config, workdir)
    learning.learn(drawer, params, Path(workdir))
