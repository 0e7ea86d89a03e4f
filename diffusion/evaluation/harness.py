"""Judging samples by metrics: one pass over the samples, whose features all metrics share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from diffusion import errors
from diffusion.evaluation import references
from diffusion.evaluation.figures import to_uint8
from diffusion.evaluation.metrics.metric import Data, Judged, Metric, Samples, shown
from diffusion.evaluation.networks.network import PIXELS, Network
from diffusion.evaluation.sets import Set, of_source
from diffusion.evaluation.shards import SAMPLES, SHAPE, Shards

SHARD = 1000
SPLITS = ("train", "test", "validation")


class Need(NamedTuple):
    """A network, those of its outputs that are needed, and of how many samples; 0 is all."""

    network: Network
    outputs: tuple[str, ...]
    most: int

    def joined(self, other: Need) -> Need:
        """What serves both."""
        outputs = tuple(dict.fromkeys([*other.outputs, *self.outputs]))
        most = max(self.most, other.most) if self.most and other.most else 0
        return Need(self.network, outputs, most)

    def count(self, samples: Samples) -> int:
        """Of how many samples."""
        return min(self.most or samples.count, samples.count)

    @property
    def names(self) -> dict[str, str]:
        """The name that each output's shards have."""
        return {output: f"{self.network.key}.{output}" for output in self.outputs}


@dataclass(eq=False)
class Harness:
    """Judges samples of one model, or of files, against the same real examples.

    Attributes:
      metrics: of ``make``.
      pipeline: the model; None for samples from files.
      data: gives the real examples, if they are needed.
      reference: the real examples of metrics that name none: "test" (held out), "train",
        "validation" (held out, for choices) or the path of a reference.
    """

    metrics: Mapping[str, Metric]
    pipeline: Any = None
    data: Callable[[], Data] | None = None
    reference: str = "test"
    _real: dict[tuple[str, str], Set] = field(default_factory=dict)

    @cached_property
    def needs(self) -> dict[str, Need]:
        """What samples must be seen by, by the network's key."""
        needs: dict[str, Need] = {}
        for metric in self.metrics.values():
            wanted = [Need(metric.network, metric.outputs, metric.most)] if metric.outputs else []
            wanted += [Need(PIXELS, ("features",), 0)] if metric.pictures else []
            for need in wanted:
                key = need.network.key
                needs[key] = need.joined(needs[key]) if key in needs else need
        return needs

    def check_references(self) -> None:
        """Raises FileNotFoundError or ValueError for a reference's file that is not there."""
        for metric in self.metrics.values():
            for name in (name or self.reference for name in metric.references):
                if name not in SPLITS and not Path(name).is_file():
                    raise FileNotFoundError(
                        f"no such file: {name!r}; expected an .npz, or one of {', '.join(SPLITS)}"
                    )

    @property
    def uses_data(self) -> bool:
        """Whether figures depend on the config's real examples."""
        named = {name or self.reference for m in self.metrics.values() for name in m.references}
        return bool(named.intersection(SPLITS)) or any(
            not metric.references for metric in self.metrics.values()
        )

    def evaluate(
        self,
        samples: Samples | None,
        params: Any = None,
        *,
        shard: int = SHARD,
        folder: Path | None = None,
    ) -> dict[str, Any]:
        """``collect``, in memory, and then ``figures``."""
        shards = Shards(shard)
        self.collect(samples, params, shards)
        return self.figures(samples, params, shards, folder)

    def collect(
        self,
        samples: Samples | None,
        params: Any,
        shards: Shards,
        *,
        keep: str = "",
        part: tuple[int, int] = (0, 1),
    ) -> bool:
        """Fills ``shards`` with the features of the samples; whether it holds them all.

        Args:
          samples: what is judged; None if no metric needs any.
          params: of the pipeline.
          shards: where features are kept. Those that are there are not computed again. Figures do
            not depend on the size of the shards.
          keep: "samples": the samples stay there too, as pictures in ADM's format, so that other
            metrics need not draw them again.
          part: (i, n): only shards i, i + n, i + 2 n, ... are made here.

        Raises:
          ValueError, FileNotFoundError: a metric's real examples or samples do not fit.
        """
        if not self.needs:
            return True
        if samples is None or samples.count < 2:
            raise ValueError(f"expected two samples at least, got {samples and samples.count}")
        for spec, metric in self.metrics.items():
            with errors.field(spec):
                for name in metric.references:  # before hours are spent on samples
                    real = self.real(name, metric.network, params)
                    if not metric.moments:
                        next(real.chunks(metric.outputs[0]))
        self._collect(samples, params, shards, keep, part)
        return not any(
            shards.missing(name, need.count(samples))
            for need in self.needs.values()
            for name in need.names.values()
        )

    def figures(
        self, samples: Samples | None, params: Any, shards: Shards, folder: Path | None = None
    ) -> dict[str, Any]:
        """The figures of all metrics by name, and "provenance": what each metric's depend on.

        ``folder`` is where metrics leave pictures.
        """
        figures: dict[str, Any] = {}
        provenance = {}
        for spec, metric in self.metrics.items():
            own = self.set(samples, metric, shards) if metric.outputs else None
            real = partial(self.real, net=metric.network, params=params)
            model = (self.pipeline, params, self.data)
            with errors.field(spec):
                found = metric.measure(Judged(own, real, metric.network, *model, folder))
            if both := figures.keys() & found.keys():
                raise ValueError(f"two metrics give the figure {sorted(both)[0]}")
            figures |= found
            provenance[spec] = {"figures": list(found)} | self._about(metric, own, params)
        return figures | {"provenance": provenance}

    def real(self, name: str, net: Network, params: Any = None) -> Set:
        """Real examples as a network sees them, computed once: see ``Judged.real``."""
        name = name or self.reference
        if (name, net.key) not in self._real:
            if name in SPLITS:
                source = self.data()[SPLITS.index(name)] if self.data else None
                if source is None or not len(source):
                    raise ValueError(f"there are no {name} examples; name a reference's file")
                show = partial(shown, self.pipeline, params)
                made = of_source(source, net, self.needs[net.key].outputs, show, name)
            else:
                made = references.read(name, net)
            self._real[name, net.key] = made
        return self._real[name, net.key]

    def _collect(
        self, samples: Samples, params: Any, shards: Shards, keep: str, part: tuple[int, int]
    ) -> None:
        """Fills this part's shards."""
        starts = list(range(0, samples.count, shards.size))[part[0] :: part[1]]
        shown_bar = sys.stderr.isatty() and len(starts) > 1
        for first in tqdm(starts, "judging", unit="shard", disable=not shown_bar):
            number, end = first // shards.size, min(first + shards.size, samples.count)
            lacking = [
                (need, output, name)
                for need in self.needs.values()
                for output, name in need.names.items()
                if shards.rows(name, number) < min(end, need.count(samples)) - first
            ]
            kept = shards.rows(SAMPLES, number) >= end - first
            if not lacking and (kept or keep != SAMPLES) and shards.rows(SHAPE, 0):
                continue
            for need, _, _ in lacking:
                need.network.open()  # wrong weights are an error before anything is drawn
            subjects = list(samples.subjects[first:end]) or [None] * (end - first)
            x = shards.read(SAMPLES, number)["arr_0"] if kept else samples.draw(first, end)
            x = self._checked(x[: end - first], subjects, params)
            if keep == SAMPLES and not kept:
                x = to_uint8(x) if x.dtype != np.uint8 and _pictures(x.shape) else x
                labels = {} if subjects[0] is None else {"arr_1": np.array(subjects)}
                shards.write(SAMPLES, number, {"arr_0": x} | labels)
            shape = {"rounded": np.array([x.dtype == np.uint8]), "shape": np.array(x.shape[1:])}
            shards.write(SHAPE, 0, shape)
            for need in {id(need): need for need, _, _ in lacking}.values():
                last = min(end, need.count(samples)) - first
                own = {output: name for other, output, name in lacking if other is need}
                values = need.network(x[:last], subjects[:last], tuple(own))
                self._check_sizes(need.network, values)
                for output, name in own.items():
                    shards.write(name, number, {output: values[output]})

    def _check_sizes(self, net: Network, values: Mapping[str, np.ndarray]) -> None:
        """Refuses features of another size than those of a reference."""
        for (name, key), real in self._real.items():
            for output in real.known.keys() & values.keys() if key == net.key else ():
                size, given = values[output][0].size, len(real.known[output].mean)
                if size != given:
                    raise ValueError(
                        f"{name} has statistics of {given} {output}, and {net.name} gives {size}: "
                        "it is of another network"
                    )

    def _checked(self, x: np.ndarray, subjects: Sequence[Any], params: Any) -> np.ndarray:
        """Samples that are finite, of the real examples' shape, each with a subject."""
        x = np.asarray(x) if x.dtype == np.uint8 else np.asarray(x, np.float32)
        for (name, key), real in self._real.items():
            sides = self.needs[key].network.pictures  # grey or not does not matter to these
            place = slice(-1) if sides else slice(None)
            if real.shape and real.shape[place] != x.shape[1:][place]:
                expected = ", ".join(map(str, real.shape))
                raise ValueError(
                    f"expected samples [N, {expected}], as the real examples of {name} are, got "
                    f"{x.shape}"
                )
        if len(subjects) != len(x):
            raise ValueError(
                f"expected a subject for each of the {len(x)} samples, got {len(subjects)}"
            )
        if x.dtype != np.uint8 and not np.isfinite(x).all():
            bad = int((~np.isfinite(x)).reshape(len(x), -1).any(1).sum())
            raise ValueError(f"{bad} of {len(x)} samples contain NaN or infinity")
        clipped = x.dtype != np.uint8 and _pictures(x.shape)
        return x.clip(-1, 1) if clipped else x

    def set(self, samples: Samples, metric: Metric, shards: Shards) -> Set:
        """The samples as a metric's network sees them."""
        shape = tuple(shards.read(SHAPE, 0)["shape"].tolist())
        count, key = min(metric.most or samples.count, samples.count), metric.network.key
        examples = None
        if metric.pictures:

            def examples(index: np.ndarray) -> np.ndarray:
                number = index // shards.size
                rows = [
                    shards.read(f"{PIXELS.key}.features", k)["features"][i - k * shards.size]
                    for k, i in zip(number, index)
                ]
                return np.stack(rows).reshape(-1, *shape)

        return Set(
            samples.name,
            count,
            lambda output: shards.chunks(f"{key}.{output}", output, count),
            samples.subjects[:count],
            {"checksum": samples.checksum, "rounded": bool(shards.read(SHAPE, 0)["rounded"][0])},
            shape=shape,
            examples=examples,
        )

    def _about(self, metric: Metric, own: Set | None, params: Any) -> dict[str, Any]:
        """What the figures of a metric depend on, which must agree where they are compared."""
        about: dict[str, Any] = {} if metric.network is None else dict(metric.network.about)
        if own is not None:
            about["quantised"] = about["quantised"] or own.about["rounded"]
            about |= {"count": own.count, "resolution": list(own.shape), "samples": own.name}
            about["samples_checksum"] = own.about["checksum"]
        real = [self.real(name, metric.network, params) for name in metric.references]
        listed = [{"name": r.name, "count": r.count} | dict(r.about) for r in real]
        return about | {"reference": listed[0] if len(listed) == 1 else listed or None}


def _pictures(shape: Sequence[int]) -> bool:
    """Whether examples [N, ...] of a shape are pictures, or clips of them."""
    return len(shape) in (4, 5) and shape[-1] in (1, 3)
