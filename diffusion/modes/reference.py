"""--mode=reference: statistics and features of real examples, to judge samples against."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from diffusion.config import judging, ranges
from diffusion.config.data import make_source
from diffusion.errors import field
from diffusion.evaluation import references, sample_files
from diffusion.evaluation.figures import to_uint8
from diffusion.evaluation.harness import Harness
from diffusion.evaluation.metrics.metric import Judged, Metric, Samples
from diffusion.evaluation.moments import moments
from diffusion.evaluation.shards import Shards
from diffusion.runs import workdir as workdirs
from diffusion.specs import unknown


def run(config: ConfigDict, workdir: str) -> None:
    """Makes a reference of config.data, or of ``config.evaluation.samples``.

    Leaves ``workdir/DATA_SPLIT_SIZE_NETWORK.npz``, which --config.evaluation.reference takes, and
    which other evaluators read: see ``evaluation.references``. A stopped command goes on.
    """
    ranges.check(config)
    c, folder = config.evaluation, Path(workdir)
    net = judging.network(config)
    if net is None or "features" not in net.outputs:
        raise ValueError(
            f"config.evaluation.features={c.features!r}: a reference is of a feature network, such "
            "as 'inception(\"FILE.safetensors\")' or pixels"
        )
    samples, name, pick = _examples(config)
    outputs = tuple(output for output in references.OUTPUTS if output in net.outputs)
    made = Harness({name: Metric(_nothing, outputs, net)})
    settings = {"reference": name, "checksum": samples.checksum, "count": samples.count}
    settings |= net.about | {"shard": c.shard}
    settings |= {} if c.samples else {"data": config.data.to_dict()}
    shards = Shards(c.shard, folder / "shards" / workdirs.named(settings))
    with shards.used():
        made.collect(samples, None, shards)
        found = made.set(samples, made.metrics[name], shards)
        count = min(config.reference.examples, samples.count)
        index = np.linspace(0, samples.count - 1, count).astype(int)
        some = found.subset(index) if count else None

        def pictures() -> Iterator[np.ndarray]:
            for number in np.unique(index // c.shard):
                x = pick(index[index // c.shard == number])
                yield x if x.dtype == np.uint8 else to_uint8(x)

        shown = config.reference.pictures and len(found.shape) == 3 and found.shape[-1] in (1, 3)
        labels = np.array(some.subjects) if some and some.subjects else None
        size = "x".join(map(str, found.shape[:-1] or found.shape))
        path = folder / f"{name}_{size}_{net.name}.npz"
        references.write(
            path,
            net,
            {output: moments(found.chunks(output)) for output in outputs},
            some.array() if some else np.zeros((0, 0)),
            ((count, *found.shape), pictures()) if shown and count else None,
            labels if labels is not None and labels.dtype.kind in "iuU" else None,
            {"data": name, "resolution": list(found.shape)},
        )
    shards.remove()
    print(f"{samples.count} examples of {name} in {path}")


def _examples(config: ConfigDict) -> tuple[Samples, str, Callable[[np.ndarray], np.ndarray]]:
    """The real examples, their name, and what picks some of them by ascending indices."""
    if path := config.evaluation.samples:
        with field(f"config.evaluation.samples={path!r}"):
            samples = sample_files.read(path)
        return samples, Path(path).stem, partial(_among, samples)
    split = config.reference.split
    if split not in ("train", "test"):
        raise unknown("config.reference.split", split, ("train", "test"))
    source = make_source(config.data, split)
    labels = source.captions
    if not labels and source.num_classes:
        numbers = range(0, len(source), config.evaluation.shard)
        parts = (np.arange(i, min(i + config.evaluation.shard, len(source))) for i in numbers)
        labels = [int(label) for part in parts for label in source.read(part)["label"]]

    def pick(index: np.ndarray) -> np.ndarray:
        return source.read(index)["x"]

    def draw(first: int, end: int) -> np.ndarray:
        return pick(np.arange(first, end))

    return Samples(len(source), draw, labels, source.name), f"{source.name}_{split}", pick


def _among(samples: Samples, index: np.ndarray) -> np.ndarray:
    return samples.draw(index[0], index[-1] + 1)[index - index[0]]


def _nothing(judged: Judged) -> dict:
    return {}
