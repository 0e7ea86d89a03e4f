"""A metric class by class: samples of a class beside the real examples of that class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from diffusion.evaluation.metrics.metric import Judged, Metric
from diffusion.evaluation.sets import Set, of_arrays


def metric(of: Metric) -> Metric:
    """Each figure of another metric by class, {class: figure}, named NAME_per_class.

    Both sets must know their classes or captions. Few examples of a class raise Fréchet distances
    (their bias grows with D / N), so that these figures compare classes and models, and are not
    comparable with those of all classes together.
    """
    if not of.outputs:
        raise ValueError("per_class needs a metric of samples, such as per_class(frechet(pixels))")

    def measure(judged: Judged) -> dict[str, Any]:
        found: dict[str, dict[str, float]] = {}
        samples = in_memory(judged.samples, of.outputs)
        references = cache(lambda name: in_memory(judged.real(name), of.outputs))
        for subject in sorted(set(samples.subjects), key=str):

            def real(name: str, subject: Any = subject) -> Set:
                return of_class(references(name), subject)

            own = of_class(samples, subject)
            if own.count < 2:
                raise ValueError(f"per_class needs two samples of each class; {subject!r} has one")
            for name, figure in of.measure(judged._replace(samples=own, real=real)).items():
                if isinstance(figure, float):
                    found.setdefault(f"{name}_per_class", {})[str(subject)] = figure
        if not found:
            raise ValueError("per_class needs the class of each sample, and these have none")
        return found

    return replace(of, measure=measure)


def in_memory(examples: Set, outputs: Sequence[str]) -> Set:
    """The same examples, whose files need not be read again for each class."""
    arrays = {output: examples.array(output) for output in outputs}
    own = of_arrays(examples.name, arrays, examples.subjects, examples.about, examples.shape)
    return replace(own, examples=examples.examples)


def of_class(examples: Set, subject: Any) -> Set:
    """The examples of a class."""
    index = np.flatnonzero([own == subject for own in examples.subjects])
    if not len(index):
        raise ValueError(f"{examples.name} has no example of class {subject!r}")
    return examples.subset(index)
