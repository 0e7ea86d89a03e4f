"""Images per second of the data pipeline alone, against PyTorch's DataLoader and against training.

    python benchmarks/data.py --json=runs/benchmarks/data.json

Photographs (JPEG files, written by the script) are decoded, resized, cropped at random and
mirrored; arrays of CIFAR-10's size are shuffled and mirrored. Both sides do the same with Pillow
and NumPy, in the same number of threads or processes, and give float batches in [-1, 1]. Every
repetition starts a new stream; its first batch, which includes the start, is not counted.
Medians over alternating repetitions. Training is a step of configs/cifar10_ddpm.py.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import jax
import numpy as np
import report
import torch
from absl import flags
from PIL import Image

from configs import base, cifar10_ddpm
from diffusion import compiler
from diffusion.config import data
from diffusion.config.experiment import build
from diffusion.training import parallel
from diffusion.training.state import create
from diffusion.training.step import make_train_step

SIDE = 256  # of a cropped photograph, in pixels
PHOTOS = {"photographs, 500 x 375": ((500, 375), 24), "photographs, 2000 x 1500": ((2000, 1500), 8)}
"""Width and height, and batches of 32 that are timed."""
SETTINGS = {"1 thread": (1, 0, 0), "2 threads": (2, 0, 0), "2 processes": (1, 2, 2)}
"""Our threads and workers, and the DataLoader's workers; it has no threads, then one process."""


class Photos(torch.utils.data.Dataset):
    """The same with Pillow, an example at a time: resized to cover, cropped, mirrored."""

    def __init__(self, files: list[Path], side: int):
        self.files, self.side = files, side

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i: int) -> torch.Tensor:
        image = Image.open(self.files[i]).convert("RGB")
        scale = self.side / min(image.size)
        size = [max(self.side, round(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (int(torch.randint(side - self.side + 1, ())) for side in size)
        image = image.crop((left, top, left + self.side, top + self.side))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return x.float().div_(127.5).sub_(1)


class Arrays(torch.utils.data.Dataset):
    """Rows of an array and their labels, mirrored at random."""

    def __init__(self, x: np.ndarray, label: np.ndarray):
        self.x, self.label = torch.from_numpy(x).permute(0, 3, 1, 2), torch.from_numpy(label)

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x[i].float().div_(127.5).sub_(1)
        return (x.flip(-1) if torch.rand(()) < 0.5 else x), self.label[i]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5, help="medians are over these")
    parser.add_argument("--photos", type=int, default=256, help="files of each size")
    parser.add_argument(
        "--step_batch", type=int, default=8, help="images of a training step; 0: none"
    )
    parser.add_argument("--json", default="", help="where to write the results")
    arguments = parser.parse_args()
    print(compiler.tune())
    if arguments.photos < 64:
        parser.error(f"--photos must be at least 64, two batches; got {arguments.photos}")
    flags.FLAGS.mark_as_parsed()
    torch.set_num_threads(1)  # as in its worker processes: an example is too small to share
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = cifar_like(Path(folder))
        for name, (size, batches) in PHOTOS.items():
            files = write_photos(Path(folder, f"{size[0]}"), arguments.photos, size)
            config = photos_config(files[0].parent)
            theirs = Photos(files, SIDE)
            rows += compare(name, config, theirs, batches, arguments.repetitions)
        config = arrays_config(path)
        with np.load(path) as file:
            theirs = Arrays(file["x"], file["label"])
        rows += compare("arrays, 32 x 32", config, theirs, 300, arguments.repetitions)
        config.train.batch_size = arguments.step_batch
        speed = training(config, arguments.repetitions) if arguments.step_batch else None
    columns = {"data": "data", "setting": "in", "ours": "here [images/s]"}
    columns |= {"theirs": "DataLoader [images/s]", "ratio": "here / DataLoader"}
    if speed is not None:
        print(f"a training step of configs/cifar10_ddpm.py takes {speed:.3g} images/s; of arrays")
        for row in (row for row in rows if row["data"].startswith("arrays")):
            print(
                "the pipeline gives {:.3g} times as many in {setting}".format(
                    row["ours"] / speed, **row
                )
            )
        rows.append({"data": "training step of cifar10_ddpm", "ours": speed})
    report.finish(rows, columns, arguments, "grain", "pillow", "torch")


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> list[Path]:
    """Parts of scikit-learn's two photographs, enlarged or reduced, as JPEGs."""
    from sklearn.datasets import load_sample_images

    folder.mkdir()
    rng, photos = (
        np.random.default_rng(0),
        [Image.fromarray(x) for x in load_sample_images().images],
    )
    for i in range(count):
        photo = photos[i % len(photos)]
        share = rng.uniform(0.5, 1)
        wide, high = (int(share * side) for side in (photo.height * 4 // 3, photo.height))
        left, top = rng.integers(photo.width - wide + 1), rng.integers(photo.height - high + 1)
        part = photo.resize(size, Image.Resampling.BICUBIC, (left, top, left + wide, top + high))
        part.save(folder / f"{i:05d}.jpg", quality=90)
    return sorted(folder.iterdir())


def cifar_like(folder: Path) -> Path:
    """50,000 images of noise, and labels."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (50_000, 32, 32, 3), np.uint8)
    np.savez(folder / "cifar.npz", x=x, label=rng.integers(0, 10, len(x)))
    return folder / "cifar.npz"


def photos_config(folder: Path) -> Any:
    c = base.get_config()
    c.data.update(name="folder", dir=str(folder), size=SIDE, crop="random", flip=True)
    c.train.batch_size = 32
    return c


def arrays_config(path: Path) -> Any:
    c = cifar10_ddpm.get_config()
    c.data.update(name="arrays", dir=str(path))
    return c


def compare(
    name: str, config: Any, dataset: torch.utils.data.Dataset, batches: int, repetitions: int
) -> list[dict[str, Any]]:
    """A row for each setting: images per second, ours and the DataLoader's."""
    source, rows = data.make_source(config.data, "train"), []
    size = config.train.batch_size
    for setting, (threads, workers, their_workers) in SETTINGS.items():
        config.data.update(threads=threads, workers=workers, prefetch=2)

        def ours() -> Iterator[Any]:
            return data.batches(config, source, 0)

        def theirs(workers: int = their_workers) -> Iterator[Any]:
            loader = torch.utils.data.DataLoader(
                dataset, size, shuffle=True, num_workers=workers, drop_last=True
            )
            while True:
                yield from loader

        seconds = {"ours": [], "theirs": []}
        for _ in range(repetitions):
            for side, start in (("ours", ours), ("theirs", theirs)):
                seconds[side].append(drain(start, batches))
        speed = {side: batches * size / float(np.median(s)) for side, s in seconds.items()}
        rows.append({"data": name, "setting": setting, **speed})
        rows[-1]["ratio"] = speed["ours"] / speed["theirs"]
        rows[-1] |= {f"{side}_all": [batches * size / t for t in s] for side, s in seconds.items()}
        print(
            "{data}, {setting}: {ours:.4g} and {theirs:.4g} images/s".format(**rows[-1]), flush=True
        )
    return rows


def drain(start: Callable[[], Iterator[Any]], batches: int) -> float:
    """Seconds for that number of batches after the first one."""
    stream = start()
    next(stream)
    began = time.perf_counter()
    for _ in itertools.islice(stream, batches):
        pass
    seconds = time.perf_counter() - began
    del stream  # this also ends its threads and processes
    return seconds


def training(config: Any, repetitions: int) -> float:
    """Images per second of the training step alone, on all cores."""
    experiment = build(config)
    layout = parallel.make("pmap", None)
    batch, key = next(data.batches(config, experiment.train, 0)), jax.random.key(0)
    state = create(experiment.objective, experiment.optimizer, experiment.emas, key, batch)
    state, key = parallel.place(layout, (state, key))  # as the step returns them
    batch = parallel.place_batch(layout, batch)
    step = make_train_step(experiment.objective, experiment.optimizer, experiment.emas)
    seconds = []
    for _ in range(repetitions + 1):
        began = time.perf_counter()
        state, metrics = step(state, None, batch, key)
        jax.block_until_ready(metrics)
        seconds.append(time.perf_counter() - began)
    return config.train.batch_size / float(np.median(seconds[1:]))  # the first compiles


if __name__ == "__main__":
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    main()
