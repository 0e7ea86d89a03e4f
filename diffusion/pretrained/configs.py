"""The fields of a ``config.json``: each is used, has its one supported value, or is harmless."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from difflib import get_close_matches
from types import SimpleNamespace
from typing import Any


def fields(
    config: Mapping[str, Any],
    what: str,
    defaults: Mapping[str, Any],
    supported: Mapping[str, Collection[Any]],
    harmless: Collection[str] = (),
) -> SimpleNamespace:
    """The values of the fields in ``defaults``, lists as tuples.

    Args:
      config: as in the file; fields whose names start with "_" say nothing about the network.
      what: the class's name, for errors.
      defaults: the fields that are used, and what the class takes for absent ones.
      supported: the legal values of some fields, used or not; the first is an absent field's.
      harmless: other fields, which change nothing that is computed.

    Raises:
      ValueError: for an unknown field or an unsupported value, naming it and what is supported.
    """
    known = {*defaults, *supported, *harmless}
    for field, value in config.items():
        if not field.startswith("_") and field not in known:
            near = get_close_matches(field, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"{field}={value!r}: {what} has no such field{hint}")
    for field, legal in supported.items():
        value = _frozen(config.get(field, defaults.get(field, next(iter(legal)))))
        if value not in legal:
            choices = ", ".join(map(repr, legal))
            raise ValueError(f"{field}={value!r}: {what} is supported with {choices}")
    used = {field: config.get(field, default) for field, default in defaults.items()}
    return SimpleNamespace(**{field: _frozen(value) for field, value in used.items()})


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, (list, tuple)) else value
