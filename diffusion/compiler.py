"""Options that make the networks fast on a CPU; ``tune`` sets them all.

Importing ``diffusion`` changes nothing in a process. ``main.py`` calls ``tune``, and so do the
notebooks and the benchmarks; a script of your own may ``print(compiler.tune())``.

XLA reads its options from the environment variable XLA_FLAGS when the first device is used, and
ends the process at an option that it does not know. So they are set only for versions that are
known to have them, and never over an option that XLA_FLAGS names already:
``XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=`` in the environment restores XLA's default.

There are no options for GPUs: the defaults of JAX 0.10 and 0.11 there stay.

A compiled step takes one block for all its intermediate results. The C library (glibc) maps a block
of 32 MiB or more from the system and gives it back when it is freed, so that each step meets its
memory anew, page by page, filled with zeros. Memory that stays in the heap is filled once. Only the
main thread's heap can grow so far: JAX must compute in the thread that calls it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Mapping, MutableMapping
from importlib.metadata import PackageNotFoundError, version

import jax
from jax._src import xla_bridge

# JAX's CPU backend gives convolutions to YNNPACK, which is slower at them than the older Eigen (see
# benchmarks/README.md). Reductions stay with YNNPACK, which halves the time of group norms.
OPTIONS = {"--xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# Packages that read XLA_FLAGS, and their versions, major.minor, that have these options.
KNOWN = {
    "jaxlib": ("0.10", "0.11", "0.12"),
    "jax-cuda12-pjrt": ("0.10", "0.11"),
    "jax-cuda13-pjrt": ("0.10", "0.11"),
    "jax-rocm7-pjrt": (),
    "libtpu": (),
}

# For glibc's mallopt: the parameter, our value, and the environment variable of the same effect.
TRIM_THRESHOLD = (-1, 2**31 - 1, "MALLOC_TRIM_THRESHOLD_")
MMAP_MAX = (-4, 0, "MALLOC_MMAP_MAX_")
TUNABLES = "GLIBC_TUNABLES"


def installed() -> dict[str, str]:
    """Versions of the installed packages that read XLA_FLAGS, by name."""
    found = {}
    for name in KNOWN:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def for_cpus_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether JAX will use CPUs: JAX_PLATFORMS demands it, or it has no other backend here."""
    return environment.get("JAX_PLATFORMS") == "cpu" or set(installed()) <= {"jaxlib"}


def with_options(flags: str, versions: Mapping[str, str]) -> str:
    """``flags``, the value of XLA_FLAGS, with those ``OPTIONS`` that it does not name; unchanged if
    one of the installed packages, ``versions`` by name, may not know them."""
    for name, number in versions.items():
        if ".".join(number.split(".")[:2]) not in KNOWN[name]:
            return flags
    given = {flag.split("=")[0] for flag in flags.split()}
    added = [f"{name}={value}" for name, value in OPTIONS.items() if name not in given]
    return " ".join([flags, *added]).strip()


def keep_freed(environment: Mapping[str, str] = os.environ) -> bool:
    """Makes glibc keep freed memory, and JAX's CPU backend compute in the calling thread.

    Does nothing without glibc, nor where the environment sets one of the variables above. Returns
    whether glibc keeps freed memory now.
    """
    named = (TUNABLES, *(name for _, _, name in (TRIM_THRESHOLD, MMAP_MAX)))
    if not sys.platform.startswith("linux") or any(name in environment for name in named):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # another C library
        return False
    for parameter, value, _ in (MMAP_MAX, TRIM_THRESHOLD):
        mallopt(parameter, value)
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    return True


def tune(environment: MutableMapping[str, str] = os.environ) -> str:
    """Sets the options of XLA and of the C library's allocator for this process.

    What the environment sets already stays as it is. Returns one line to print: what is in force,
    and how to override it. Raises RuntimeError where JAX has used a device before.
    """
    flags = environment.get("XLA_FLAGS", "")
    tuned = with_options(flags, installed())
    if tuned != flags:
        if xla_bridge.backends_are_initialized():
            raise RuntimeError("call tune() before JAX uses a device; restart Python to tune now")
        environment["XLA_FLAGS"] = tuned
    options = [f"{name}={value}" for name, value in OPTIONS.items()]
    parts = [f"XLA_FLAGS has {option}" for option in options if option in tuned.split()]
    if for_cpus_alone(environment) and keep_freed(environment):
        parts.append("freed memory stays with the process (MALLOC_MMAP_MAX_=65536 undoes it)")
    return f"speed: {'; '.join(parts) or 'nothing is set'}. The environment's own values win."
