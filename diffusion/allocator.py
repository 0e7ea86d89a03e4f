"""Memory that a CPU process has freed stays with it, so that the next step finds it ready.

A compiled step takes one block for all its intermediate results, tens of megabytes even for small
networks. The C library (glibc) maps a block of 32 MiB or more from the system and gives it back
when it is freed. Each step then meets its memory anew, page by page, and the system first fills
every page with zeros. Memory that stays in the heap is filled once.

Only the main thread's heap can grow so far; those of other threads end at 64 MiB. JAX must
therefore compute in the thread that calls it, and not in a thread of its own.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping

import jax

# For glibc's mallopt: the parameter, our value, and the environment variable of the same effect.
TRIM_THRESHOLD = (-1, 2**31 - 1, "MALLOC_TRIM_THRESHOLD_")
MMAP_MAX = (-4, 0, "MALLOC_MMAP_MAX_")
TUNABLES = "GLIBC_TUNABLES"


def keep_freed(environment: Mapping[str, str] = os.environ) -> bool:
    """Makes glibc keep freed memory, and JAX's CPU backend compute in the calling thread.

    Does nothing without glibc, nor where the environment sets GLIBC_TUNABLES,
    MALLOC_TRIM_THRESHOLD_ or MALLOC_MMAP_MAX_. JAX's part, the option
    ``jax_cpu_enable_async_dispatch``, has no effect once JAX has used a device.

    Returns: whether glibc keeps freed memory now.
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
