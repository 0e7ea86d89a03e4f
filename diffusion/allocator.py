"""Memory that a CPU process has freed stays with it, so that the next step need not ask for it.

A compiled step takes one block for all that it computes in between, tens of megabytes even for
small networks. The C library (glibc) maps a block of 32 MiB or more from the system and gives it
back when it is freed: each step then meets all of its memory anew, page by page, which the system
first fills with zeros. Kept in the heap, that is done once.

The heap that grows so far is the main thread's. JAX must therefore compute in the thread that asks
it to, and not in one of its own, whose heaps end at 64 MiB.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

import jax

# glibc's mallopt: parameter, value, and what sets it in a user's environment.
TRIM_THRESHOLD = (-1, 2**31 - 1, "MALLOC_TRIM_THRESHOLD_")
MMAP_MAX = (-4, 0, "MALLOC_MMAP_MAX_")
TUNABLES = "GLIBC_TUNABLES"


def keep_freed(environment: Mapping[str, str] = os.environ) -> bool:
    """Has glibc keep what is freed, and JAX's CPU backend compute in the calling thread.

    Does nothing where there is no glibc, nor where the environment says how it is to be, by
    GLIBC_TUNABLES, MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_MAX_. JAX's part, the option
    ``jax_cpu_enable_async_dispatch``, has no effect once a device was asked for.

    Returns: whether it was done.
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
