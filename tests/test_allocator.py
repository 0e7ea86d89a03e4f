"""Freed memory stays with a tuned CPU process, unless the environment overrides it."""

import os
import subprocess
import sys

import pytest

from diffusion import compiler

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")

# Blocks that are written and freed again, of more than the allocator would keep by itself.
CODE = """
import ctypes, jax
from diffusion import compiler
compiler.tune()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes, libc.free.argtypes = [ctypes.c_size_t], [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
before, size = resident(), 96 * 2**20
block = libc.malloc(size)
libc.memset(block, 1, size)
libc.free(block)
print(resident() - before > 90, jax.config.values["jax_cpu_enable_async_dispatch"])
print(float(jax.jit(lambda x: x + 1)(1.0)))
"""


def result(**variables):
    environment = os.environ | {"JAX_PLATFORMS": "cpu"} | variables
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True
    )
    *kept, two = done.stdout.split()
    assert two == "2.0", done.stderr
    return kept


def test_freed_memory_stays_and_steps_run_in_the_thread_that_asks():
    assert result() == ["True", "False"]


@pytest.mark.parametrize(
    "variable, value",
    [
        ("MALLOC_MMAP_MAX_", "65536"),
        ("MALLOC_TRIM_THRESHOLD_", "131072"),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=131072"),
    ],
)
def test_the_environment_overrides(variable, value):
    assert result(**{variable: value}) == ["False", "True"]


def test_only_where_jax_uses_cpus(monkeypatch):
    assert compiler.for_cpus_alone({"JAX_PLATFORMS": "cpu"})
    monkeypatch.setattr(compiler, "installed", lambda: {"jaxlib": "0.11.0"})
    assert compiler.for_cpus_alone({})
    monkeypatch.setattr(compiler, "installed", lambda: {"jaxlib": "0.11.0", "libtpu": "0.0.30"})
    assert not compiler.for_cpus_alone({})
    assert compiler.for_cpus_alone({"JAX_PLATFORMS": "cpu"})
