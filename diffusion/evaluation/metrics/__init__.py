"""Metrics: one file each, named after what it measures.

In each file the metric itself is one function of arrays or sources. It returns a number, or figures
by name that JSON can hold, with the same figure for real data beside them where there is one. The
contract by which an evaluation calls metrics is::

    metric(pipeline, params, data, draw) -> {name: figure}

with ``pipeline`` a model and all that it takes to use it, ``params`` its weights, ``data`` the
held-out and training sources, and ``draw(count)`` samples in batches, with what they were drawn
for. A metric keeps statistics of the batches (as ``frechet.Statistics``), not the batches. A figure
in a network's features has the network's name in its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

Batch = Mapping[str, Any]
Draw = Callable[[int], Iterator[Batch]]
"""Number of samples -> batches {"x": samples, "label": classes or captions' indices, ...}."""
Metric = Callable[[Any, Any, Mapping[str, Any], Draw], dict[str, float]]
