"""Commands as main.py runs them, in this process: what an error says, and that nothing is lost."""

import contextlib
import io
import os
import re
from pathlib import Path
from unittest import mock

import jax

import main

ROOT = Path(__file__).parents[1]
# What belongs in a traceback, not in the first line that a user reads.
INTERNALS = re.compile(
    r"Traceback|KeyError|IndexError|AttributeError|TypeError|object at 0x|<class|<function|"
    r"\b(orbax|jaxlib|numpy|flax|tensorstore|ml_collections|absl|zipfile|zlib|pickle)\b|"
    r"codec can't|Errno|expected str, bytes|ConcretizationTypeError|"
    r"NoneType|ShapedArray|site-packages|subprocess",
)
LEFTOVERS = re.compile(r"\.partial$|\.saving$|orbax-checkpoint-tmp|\.tmp$")


def command(*arguments, config="configs/toy2d.py"):
    """(what the error says or None, what was printed); without ``config`` none is given."""
    error, printed = None, io.TextIOWrapper(io.BytesIO(), write_through=True)
    given = [f"--config={ROOT / config}"] if config else []
    cache = jax.config.jax_compilation_cache_dir
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            mock.patch.dict(os.environ, JAX_COMPILATION_CACHE_DIR=""),  # none, to find none
        ):
            main.main(["main.py", *given, *map(str, arguments)])
    except SystemExit as end:
        error = end.code
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    return error, printed.buffer.getvalue().decode()


def succeed(*arguments, config="configs/toy2d.py"):
    """What was printed by a command that ends without an error."""
    error, printed = command(*arguments, config=config)
    assert error is None, f"{error}\n{printed}"
    return printed


def newest(folder):
    """The folder of results that was written last."""
    return max(folder.iterdir(), key=lambda place: place.stat().st_mtime_ns)


def first_sentence(error):
    """The first line, which has to be plain."""
    assert isinstance(error, str), f"there is no message, only {error!r}"
    line = error.splitlines()[0]
    assert line.startswith("error: ") and len(line) > 25, error
    assert not INTERNALS.search(line), line
    return line


def assert_names(error, *names):
    """All of the names stand in the first sentence."""
    line = first_sentence(error)
    for name in names:
        assert str(name) in line, f"{name!r} is not in: {error}"


def contents(folder):
    """All files, by path."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def assert_nothing_lost(folder, before, moved=()):
    """Every file is still there, as it was or under its new name, and none is half written."""
    after = contents(folder)
    for path, data in before.items():
        if path.name in ("lock",):
            continue
        place = path
        for old, new in moved:
            if path.is_relative_to(old):
                place = Path(new) / path.relative_to(old)
        assert after.get(place) == data, f"{path} is lost or changed"
    left = [p for p in folder.rglob("*") if LEFTOVERS.search(p.name)]
    assert not left
