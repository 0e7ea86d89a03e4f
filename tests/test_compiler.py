"""XLA's options: the defaults, the user's, and versions that do not know them."""

import os
import subprocess
import sys

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


def test_twice_is_once():
    environment = {}
    compiler.set_options(environment)
    once = dict(environment)
    compiler.set_options(environment)
    assert environment == once


@pytest.mark.skipif(
    any(version[:4] not in ("0.10", "0.11", "0.12") for version in compiler.installed().values()),
    reason="another JAX, for which nothing is set",
)
def test_importing_the_package_sets_them_and_this_jax_takes_them():
    assert f"{NAME}={VALUE}" in os.environ["XLA_FLAGS"].split()  # of this process, by its imports
    code = "import jax, diffusion; print(jax.jit(lambda x: x + 1)(1.0))"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "2.0", done.stderr
    # A name that XLA does not know would have ended that process; this one takes it by the call.
    option = {NAME.removeprefix("--"): VALUE}
    assert jax.jit(lambda x: x + 1, compiler_options=option)(1.0) == 2
