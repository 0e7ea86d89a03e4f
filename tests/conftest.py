"""Four virtual CPU devices for every test; must run before JAX is imported."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# XLA's CPU collectives deadlock when there are fewer threads than virtual devices need.
os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4"
).strip()
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
