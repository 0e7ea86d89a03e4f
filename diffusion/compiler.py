"""Options of XLA that make the networks fast, set when ``diffusion`` is imported.

XLA reads its options from the environment variable XLA_FLAGS when the first device is asked for,
and ends the process at an option it does not know. So they are set before that, for versions that
are known to have them, and never over what is in XLA_FLAGS already: with
``XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=`` in the environment all is as XLA has it.

There are none for GPUs: what JAX 0.10 and 0.11 do there by default (autotuning, command buffers,
cuBLASLt, Triton's matrix products) stays.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, MutableMapping
from importlib.metadata import PackageNotFoundError, version

# JAX's CPU backend gives convolutions to YNNPACK, which takes longer than the older Eigen here (see
# benchmarks/README.md); reductions stay with YNNPACK, which halves the time of group norms.
OPTIONS = {"--xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# What may read XLA_FLAGS, and the versions, major.minor, that have these options.
KNOWN = {
    "jaxlib": ("0.10", "0.11", "0.12"),
    "jax-cuda12-pjrt": ("0.10", "0.11"),
    "jax-cuda13-pjrt": ("0.10", "0.11"),
    "jax-rocm7-pjrt": (),
    "libtpu": (),
}


def installed() -> dict[str, str]:
    """Versions of those readers of XLA_FLAGS that there are."""
    found = {}
    for name in KNOWN:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def for_cpus_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether JAX will use CPUs: it is told to, or nothing for accelerators is installed."""
    return environment.get("JAX_PLATFORMS") == "cpu" or set(installed()) <= {"jaxlib"}


def with_options(flags: str, versions: Mapping[str, str]) -> str:
    """``flags``, XLA_FLAGS' value, with those ``OPTIONS`` that it does not name.

    They are left out where one of the installed readers, in ``versions`` by name, is of a version
    that may not know them: XLA would end the process.
    """
    for name, number in versions.items():
        if ".".join(number.split(".")[:2]) not in KNOWN[name]:
            return flags
    given = {flag.split("=")[0] for flag in flags.split()}
    added = [f"{name}={value}" for name, value in OPTIONS.items() if name not in given]
    return " ".join([flags, *added]).strip()


def set_options(environment: MutableMapping[str, str] = os.environ) -> None:
    """Puts the options into XLA_FLAGS. Where a device was asked for before, this has no effect."""
    flags = with_options(environment.get("XLA_FLAGS", ""), installed())
    if flags:
        environment["XLA_FLAGS"] = flags
