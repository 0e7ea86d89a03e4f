"""What a figure depends on besides the samples' model, and how this differs between two figures."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from typing import Any

UNKNOWN = "it was not recorded what these depend on, so they are compared with no others"

Basis = dict[str, Any]


def basis(spec: str, about: Mapping[str, Any]) -> Basis:
    """What a figure depends on, from a metric's entry of the provenance."""
    names = ("network", "weights", "preparation", "quantised", "count", "resolution")
    own = {name: about.get(name) for name in names}
    given = about.get("reference") or []
    given = [given] if isinstance(given, Mapping) else given
    listed = [(r.get("checksum") or r.get("name"), r.get("count")) for r in given]
    own["reference"] = ", ".join(
        f"{name} of {count:,} examples" if count else str(name) for name, count in listed
    )
    return own | {"options": ", ".join(_options(spec))}


def _options(spec: str) -> list[str]:
    """The options of a metric that are no texts: those are files and names of networks."""
    found = []
    for node in ast.walk(ast.parse(spec, mode="eval")):
        if isinstance(node, ast.Call):
            given = [("", arg) for arg in node.args]
            given += [(f"{k.arg}=", k.value) for k in node.keywords]
            numbers = [
                (name, arg)
                for name, arg in given
                if not isinstance(arg, (ast.Call, ast.Name))
                and not (isinstance(arg, ast.Constant) and isinstance(arg.value, str))
            ]
            found += [name + ast.unparse(arg) for name, arg in numbers]
    return sorted(found)


def difference(own: Basis | None, other: Basis | None) -> str:
    """How what a figure depends on differs from what it should; "" if it does not."""
    if own is None or other is None:
        return UNKNOWN
    parts = []
    for name in own:
        a, b = own[name], other[name]
        if a == b:
            continue
        if name == "count":
            parts.append(f"{_number(a)} samples instead of {_number(b)}")
        elif name == "quantised":
            parts.append("samples rounded to 8 bits" if a else "samples not rounded to 8 bits")
        else:
            parts.append(f"{name} {_text(a)} instead of {_text(b)}")
    return "; ".join(parts)


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else "unknown"


def _text(value: Any) -> str:
    return " × ".join(map(str, value)) if isinstance(value, list) else str(value or "none")
