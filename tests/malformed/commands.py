"""Commands as main.py runs them, in this process: what is told, and that nothing is lost."""

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from unittest import mock

import jax
from absl import flags

import main

ROOT = Path(__file__).parents[2]
# What belongs in a traceback, not in what a user is told first.
INTERNALS = re.compile(
    r"Traceback|KeyError|IndexError|AttributeError|TypeError|object at 0x|<class|<function|"
    r"\b(orbax|jaxlib|numpy|flax|tensorstore|ml_collections|absl|zipfile|zlib|pickle)\b|"
    r"codec can't|Errno|expected str, bytes|ConcretizationTypeError|"
    r"NoneType|ShapedArray|site-packages|subprocess",
)
LEFTOVERS = re.compile(r"\.partial$|\.saving$|orbax-checkpoint-tmp|\.tmp$")


def command(*arguments, config="configs/toy2d.py"):
    """(what an error told or None, what was printed); an exception is one that a user would see."""
    values = flags.FLAGS
    sys.modules.pop("config_config", None)  # else what a file lacks is there from the last one
    for name in list(values):
        if name.startswith("config."):
            delattr(values, name)
    values["config"].unparse()
    values.unparse_flags()
    for name in ("workdir", "mode"):
        values[name].unparse()
    cache = jax.config.jax_compilation_cache_dir
    told, printed, given = None, io.TextIOWrapper(io.BytesIO(), write_through=True), sys.argv
    sys.argv = ["main.py", f"--config={ROOT / config}", *map(str, arguments)]  # the config reads it
    try:
        with (
            contextlib.redirect_stdout(printed),
            contextlib.redirect_stderr(printed),
            mock.patch.dict(os.environ, JAX_COMPILATION_CACHE_DIR=""),  # none, to find none
        ):
            main.main(main.parse(sys.argv))
    except SystemExit as end:
        told = end.code
    finally:
        sys.argv = given
        jax.config.update("jax_compilation_cache_dir", cache)
    return told, printed.buffer.getvalue().decode()


def first_sentence(told):
    """The first line, which has to be plain."""
    assert isinstance(told, str), f"nothing is told, only {told!r}"
    line = told.splitlines()[0]
    assert line.startswith("error: ") and len(line) > 25, told
    assert not INTERNALS.search(line), line
    return line


def assert_told(told, *names):
    """All of the names stand in the first sentence."""
    line = first_sentence(told)
    for name in names:
        assert str(name) in line, f"{name!r} is not in: {told}"


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
