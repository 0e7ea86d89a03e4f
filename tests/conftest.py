"""Four virtual CPU devices, and quick compilation; must run before JAX is imported."""

import os
from importlib.metadata import version

# An option that a version does not know ends the process.
EMITTERS = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's CPU collectives deadlock when there are fewer threads than virtual devices need.
os.environ.setdefault("NPROC", "16")
# Tests compile much and run little: the optimiser would take most of their time.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=4",
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        # Without the optimiser these emitters take longer to compile, and give slower code.
        *(["--xla_cpu_use_fusion_emitters=false"] if EMITTERS else []),
    ]
)
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def pytest_configure():
    """Tunes the process as main.py does, before a test module can use a device."""
    from diffusion import compiler

    compiler.tune()


def pytest_collection_modifyitems(items):
    """Files of few, long tests come first, so that no process is left alone with one at the end."""
    first = ("test_notebooks.py", "test_main.py")
    items.sort(key=lambda item: item.path.name not in first)
