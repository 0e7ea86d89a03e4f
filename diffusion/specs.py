"""Components named in text: ``min_snr``, ``min_snr(gamma=3)``, ``shifted(rectified_flow, 3)``.

One config field thereby says both which function to use and its options, and an override on the
command line replaces both.
"""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from types import MappingProxyType, ModuleType
from typing import Any


def choices(module: ModuleType, names: str) -> dict[str, Callable]:
    """The functions of ``module`` with these space-separated names."""
    return {name: getattr(module, name) for name in names.split()}


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
    """The function that ``text`` names, with its options (keyword arguments) filled in.

    Args:
      text: a name, or a name with keyword arguments in parentheses; values are Python literals.
      functions: what may be named.
      field: the config field's name, for errors.
      context: values for parameters of these names, where the function has them and text doesn't.
      filled: parameters that are no options, because they are the caller's to fill in. Where it is
        given, whatever else has no default must be in the text.

    Raises:
      ValueError: for malformed text, an unknown name or option, a value of the wrong type, or a
        missing one.
    """
    name, positional, options = parse(text, functions, field)
    if positional:
        raise ValueError(f"{field}={text!r}: options need names, as in {name}(option=value)")
    target = functions[name]
    parameters = inspect.signature(target).parameters
    own = {n: p for n, p in parameters.items() if n not in filled}
    _check_options(name, options, own, field, with_required=bool(filled))
    missing = [n for n, p in own.items() if filled and p.default is p.empty and n not in options]
    if missing:
        raise ValueError(
            f"{field}={text!r}: {name} needs {', '.join(missing)}, as in {name}({missing[0]}=...)"
        )
    given = {k: v for k, v in context.items() if k in parameters and k not in options}
    return functools.partial(target, **given, **options) if given or options else target


def value(text: str, functions: Mapping[str, Callable], field: str) -> Any:
    """What the named function returns, called with the arguments in ``text``.

    Arguments may be positional and may themselves name functions: ``shifted(cosine, 2)``.
    """
    name, positional, options = parse(text, functions, field)
    target = functions[name]
    _check_options(name, options, inspect.signature(target).parameters, field, with_required=True)
    try:
        inspect.signature(target).bind(*positional, **options)
    except TypeError as error:
        raise ValueError(f"{field}={text!r}: {name}{inspect.signature(target)}: {error}") from None
    return target(*positional, **options)


def parse(text: str, functions: Mapping[str, Callable], field: str):
    try:
        node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if not isinstance(call.func, ast.Name):
            raise SyntaxError
        if call.func.id not in functions:
            raise unknown(field, call.func.id, functions)
        positional = [_argument(arg, functions, field) for arg in call.args]
        options = {k.arg: _argument(k.value, functions, field) for k in call.keywords}
    except (SyntaxError, TypeError, UnicodeEncodeError):
        raise ValueError(
            f"{field}: expected a name or name(option=value), got {text!r}; "
            f"names are {', '.join(sorted(functions))}"
        ) from None
    return call.func.id, positional, options


def _argument(node: ast.expr, functions: Mapping[str, Callable], field: str) -> Any:
    try:
        return ast.literal_eval(node)
    except ValueError:
        return value(ast.unparse(node), functions, field)


def _check_options(
    name: str, options: Mapping, parameters: Mapping, field: str, with_required: bool = False
) -> None:
    for option, given in options.items():
        if option not in parameters:
            valid = [n for n, p in parameters.items() if with_required or p.default is not p.empty]
            listed = ", ".join(valid) or "none"
            raise ValueError(f"{field}: {name} has no option {option!r}; its options: {listed}")
        default = parameters[option].default
        numeric = isinstance(default, (int, float)) and not isinstance(default, bool)
        expected = (int, float) if isinstance(default, float) else type(default)
        wrong_number = numeric and (isinstance(given, bool) or not isinstance(given, expected))
        wrong_kind = isinstance(default, (bool, str)) and not isinstance(given, type(default))
        if wrong_number or wrong_kind:
            raise ValueError(
                f"{field}: {name}({option}={given!r}) has the wrong type; "
                f"expected {type(default).__name__}, as in {option}={default!r}"
            )
