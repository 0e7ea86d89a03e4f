"""Not written yet."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion.pipelines.extension import Extension
from diffusion.pipelines.guidance import Specs
from diffusion.pipelines.pipeline import Pipeline

CHOICES: dict[str, Any] = {}


def make(
    pipeline: Pipeline, sampler: Any, given: Specs, size: tuple[int, int]
) -> Sequence[Extension]:
    """The extensions of specs, such as those of config; none of ()."""
    return ()
