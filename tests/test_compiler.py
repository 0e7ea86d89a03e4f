"""XLA's options: the defaults, the user's, and versions that do not know them."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from diffusion import compiler

NAME, VALUE = next(iter(compiler.OPTIONS.items()))
NOW = {"jaxlib": "0.11.0"}


def test_options_are_added_to_what_is_there():
    assert compiler.with_options("", NOW) == f"{NAME}={VALUE}"
    assert compiler.with_options("--xla_other=1", NOW) == f"--xla_other=1 {NAME}={VALUE}"


@pytest.mark.parametrize("flags", [f"{NAME}=", f"--xla_other=1 {NAME}=LIBRARY_FUSION_TYPE_DOT"])
def test_the_users_stay(flags):
    assert compiler.with_options(flags, NOW) == flags


@pytest.mark.parametrize(
    "versions",
    [
        {"jaxlib": "0.9.2"},
        {"jaxlib": "0.13.0"},
        NOW | {"jax-cuda13-pjrt": "0.12.0"},
        NOW | {"libtpu": "0.0.30"},
    ],
)
def test_versions_that_may_not_know_an_option_are_not_given_it(versions):
    assert compiler.with_options("--xla_other=1", versions) == "--xla_other=1"


def test_tuning_twice_is_tuning_once(monkeypatch):
    monkeypatch.setattr(compiler.xla_bridge, "backends_are_initialized", lambda: False)
    environment = {}
    first = compiler.tune(environment)
    once = dict(environment)
    assert compiler.tune(environment) == first
    assert environment == once


@pytest.mark.skipif(
    any(version[:4] not in ("0.10", "0.11", "0.12") for version in compiler.installed().values()),
    reason="another JAX, for which nothing is set",
)
def test_this_jax_takes_the_options_and_too_late_a_call_is_refused():
    code = (
        "import jax; from diffusion import compiler; print(compiler.tune())\n"
        "print(jax.jit(lambda x: x + 1)(1.0))\n"
        "try: compiler.tune({})\n"
        "except RuntimeError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.count("\n") == 3, done.stderr
    line, two, refusal = done.stdout.splitlines()
    assert f"{NAME}={VALUE}" in line and two == "2.0" and "restart Python" in refusal
    # A name that XLA does not know would have ended that process; this one takes it by the call.
    option = {NAME.removeprefix("--"): VALUE}
    assert jax.jit(lambda x: x + 1, compiler_options=option)(1.0) == 2


def test_importing_changes_nothing():
    """The environment, JAX's options and PyTorch's absence stay as they are without ``tune``."""
    code = (
        "import os, sys, jax\n"
        "before = dict(os.environ), dict(jax.config.values)\n"
        "import diffusion, diffusion.compiler, diffusion.runs.logging\n"
        "assert (dict(os.environ), dict(jax.config.values)) == before\n"
        "assert 'torch' not in sys.modules and 'tensorboardX' not in sys.modules\n"
        "import main\n"
        "assert 'torch' not in sys.modules\n"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
