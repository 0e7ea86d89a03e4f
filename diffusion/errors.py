"""How errors name options and config fields."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import numpy as np


def check_range(
    name: str, value: float, low: float = -math.inf, high: float = math.inf, above: bool = False
) -> None:
    """Raises ValueError unless ``value`` is a finite number from low to high, not low if above."""
    holds = (low < value if above else low <= value) and value <= high and abs(value) < math.inf
    if holds:
        return
    if high < math.inf:
        must = f"lie in {'(' if above else '['}{low:.4g}, {high:.6g}]"
    elif low > -math.inf:
        must = f"be a finite number {'>' if above else '>='} {low:g}"
    else:
        must = "be a finite number"
    raise ValueError(f"{name} must {must}, got {value}")


@contextlib.contextmanager
def wrong_types() -> Iterator[None]:
    """Options whose types or sizes numbers cannot have are a user's mistake too."""
    try:
        with np.errstate(all="ignore"):
            yield
    except (TypeError, ArithmeticError) as error:
        raise ValueError(f"an option has a wrong type or size: {error}") from error


@contextlib.contextmanager
def field(name: str) -> Iterator[None]:
    """Names the config field in an error of value or file that does not name one itself."""
    try:
        yield
    except (ValueError, OSError) as error:
        if str(error).startswith("config."):
            raise
        kinds = (FileNotFoundError, OSError, ValueError)
        kind = next(kind for kind in kinds if isinstance(error, kind))
        of_system = isinstance(error, OSError) and error.strerror and error.filename
        text = f"{error.strerror}: {error.filename}" if of_system else error
        raise kind(f"{name}: {text}") from error
