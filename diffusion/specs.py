"""Components named in text: ``min_snr``, ``min_snr(gamma=3)``, ``shifted(rectified_flow, 3)``.

One config field thereby says both which function to use and its options.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import math
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType, UnionType
from typing import Any

LONGEST = 100_000  # characters of a text; more than a grid with each of its levels has
DEEPEST = 20  # brackets of a text that may be open at once
SHOWN = 200  # characters of a malformed text that its error shows
LEAST, MOST, WHOLE = 1e-30, 1e30, 2**31  # sizes that float32 and int32 hold, with room for squares


def unknown(field: str, value: Any, valid: Iterable[str]) -> ValueError:
    """The error for a name that is not among the valid ones; suggests the nearest."""
    valid = sorted(valid)
    near = difflib.get_close_matches(str(value), valid, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return ValueError(f"{field}: unknown {value!r}; choose one of {', '.join(valid)}.{hint}")


def function(
    text: str,
    functions: Mapping[str, Callable],
    field: str,
    context: Mapping[str, Any] = MappingProxyType({}),
    filled: Collection[str] = (),
) -> Callable:
    """The function that ``text`` names, with its options filled in.

    Args:
      text: a name, or a name with arguments in parentheses, by position or by name; values are
        Python literals.
      functions: what may be named.
      field: the config field's name, for errors.
      context: values for parameters of these names, where the function has them and text doesn't.
      filled: parameters that are no options, because they are the caller's to fill in. Where it is
        given, whatever else has no default must be in the text.
    """
    name, positional, options = parse(text, functions, field)
    target = functions[name]
    parameters = inspect.signature(target).parameters
    own = {n: p for n, p in parameters.items() if n not in filled}
    places = [n for n, p in own.items() if filled or p.default is not p.empty]
    if len(positional) > len(places):
        listed = ", ".join(places) or "none"
        raise ValueError(f"{field}={text!r}: too many arguments; the options of {name}: {listed}")
    for option, given in zip(places, positional):
        if option in options:
            raise ValueError(f"{field}={text!r}: {name} is given {option} twice")
        options[option] = given
    _check_options(target, name, options, own, field, with_required=bool(filled))
    missing = [n for n, p in own.items() if filled and p.default is p.empty and n not in options]
    if missing:
        raise ValueError(
            f"{field}={text!r}: {name} needs {', '.join(missing)}, as in {name}({missing[0]}=...)"
        )
    given = {k: v for k, v in context.items() if k in parameters and k not in options}
    return functools.partial(target, **given, **options) if given or options else target


def value(
    text: str,
    functions: Mapping[str, Callable],
    field: str,
    inner: Mapping[str, Callable] | None = None,
) -> Any:
    """What the named function returns, called with the arguments in ``text``.

    Arguments may themselves name functions, ``inner``'s (by default the same): ``shifted(cosine,
    2)``.
    """
    name, positional, options = parse(text, functions, field, inner)
    target = functions[name]
    signature = inspect.signature(target)
    _check_options(target, name, options, signature.parameters, field, with_required=True)
    try:
        bound = signature.bind(*positional, **options)
    except TypeError as error:
        raise ValueError(f"{field}={text!r}: {name}{signature}: {error}") from None
    _check_options(target, name, bound.arguments, signature.parameters, field, with_required=True)
    try:
        return target(*positional, **options)
    except (TypeError, AttributeError, IndexError, ArithmeticError) as error:
        raise ValueError(
            f"{field}={text!r}: an option has a wrong type or size: {error}"
        ) from error


def values(
    given: str | Sequence[str],
    functions: Mapping[str, Callable],
    field: str,
    inner: Mapping[str, Callable] | None = None,
) -> tuple[Any, ...]:
    """The ``value`` of each text of a tuple, or of one text with commas; none of "" or ()."""
    made = []
    for text in texts(given):
        if not isinstance(text, str):
            first = next(iter(functions))
            hint = f"{first}({text})" if isinstance(text, int | float) else f"{first}(...)"
            raise ValueError(f"{field}={given!r}: expected texts such as {hint!r}")
        made.append(value(text, functions, field, inner))
    return tuple(made)


def texts(given: Any) -> list[Any]:
    """One text for each component: "cfg(3), clip()" -> ["cfg(3)", "clip()"], none for ""."""
    if isinstance(given, tuple | list):
        return list(given)
    if given == "" or not isinstance(given, str):
        return [] if given == "" else [given]
    try:
        node = ast.parse(given.strip(), mode="eval").body if _short(given) else None
        return [ast.unparse(e) for e in node.elts] if isinstance(node, ast.Tuple) else [given]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return [given]


def _short(text: str) -> bool:
    """Whether its length and its nested brackets are such as a spec may have."""
    depths = accumulate((c in "([{") - (c in ")]}") for c in text)
    return len(text) <= LONGEST and max(depths, default=0) <= DEEPEST


def parse(
    text: str,
    functions: Mapping[str, Callable],
    field: str,
    inner: Mapping[str, Callable] | None = None,
) -> tuple[str, list[Any], dict[str, Any]]:
    """The name, the positional arguments and the options in ``text``, as ``value`` reads it."""
    inner = functions if inner is None else inner
    if not isinstance(text, str):
        raise ValueError(f"{field}={text!r}: expected a text, a name or name(option=value)")
    try:
        if not _short(text):
            raise SyntaxError
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if not isinstance(call.func, ast.Name):
            raise SyntaxError
        if call.func.id not in functions:
            raise unknown(field, call.func.id, functions)
        positional = [_argument(arg, inner, field) for arg in call.args]
        names = [k.arg for k in call.keywords]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise ValueError(f"{field}: {call.func.id} is given {twice[0]} twice")
        options = {k.arg: _argument(k.value, inner, field) for k in call.keywords}
    except (SyntaxError, TypeError, UnicodeEncodeError, RecursionError, MemoryError):
        shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
        raise ValueError(
            f"{field}: expected a name or name(option=value), got {shown!r}; "
            f"names are {', '.join(sorted(functions))}"
        ) from None
    return call.func.id, positional, options


def _argument(node: ast.expr, functions: Mapping[str, Callable], field: str) -> Any:
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    try:
        given = ast.literal_eval(node)
    except ValueError:
        return value(ast.unparse(node), functions, field)
    _check_sizes(given, field)
    return given


def _check_sizes(given: Any, field: str) -> None:
    """Raises ValueError for a number that the device does not hold; 0 and inf it does."""
    if isinstance(given, (tuple, list)):
        for entry in given:
            _check_sizes(entry, field)
    elif isinstance(given, int) and abs(given) >= WHOLE:
        raise ValueError(f"{field}: a whole number of {len(str(given))} digits; expected at most 9")
    elif isinstance(given, float) and (0 < abs(given) < LEAST or MOST < abs(given) < math.inf):
        raise ValueError(f"{field}: {given} is beyond float32; expected {LEAST} to {MOST}, or 0")


def _check_options(
    target: Callable,
    name: str,
    options: dict[str, Any],
    parameters: Mapping,
    field: str,
    with_required: bool = False,
) -> None:
    """Raises ValueError for an unknown option, or one of another type than its annotation."""
    try:
        hints = typing.get_type_hints(target)
    except (NameError, TypeError):
        hints = {}
    for option, given in options.items():
        if option not in parameters:
            valid = [n for n, p in parameters.items() if with_required or p.default is not p.empty]
            listed = ", ".join(valid) or "none"
            raise ValueError(f"{field}: {name} has no option {option!r}; its options: {listed}")
        default, empty = parameters[option].default, parameters[option].empty
        bare = Any if default is empty or default is None else type(default)
        hint = hints.get(option, bare)
        if not _fits(given, hint):
            several = typing.get_origin(hint) is Sequence
            kind = "several, as in (1, 2)" if several else getattr(hint, "__name__", str(hint))
            example = "" if default is empty else f", as in {option}={default!r}"
            shown = repr(given)
            shown = f"a {type(given).__name__}" if " at 0x" in shown else shown
            raise ValueError(
                f"{field}: {name}({option}={shown}) has the wrong type; expected {kind}{example}"
            )


def _fits(given: Any, hint: Any) -> bool:
    """Whether a value is of an annotation's type; what no instance has fits."""
    kind, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind is Callable:  # which the function itself explains better
        return True
    if kind in (UnionType, typing.Union):
        return any(_fits(given, one) for one in inner)
    if kind in (int, float):
        return isinstance(given, (int, kind)) and not isinstance(given, bool)
    if inner and isinstance(kind, type) and issubclass(kind, Sequence):
        several = isinstance(given, (tuple, list))
        return several and all(any(_fits(e, one) for one in inner if one is not ...) for e in given)
    return hint is Any or not isinstance(kind, type) or isinstance(given, kind)
