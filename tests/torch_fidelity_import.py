"""Imports torch-fidelity, also where torchvision is missing; skips where it is not installed."""

import importlib.util
import sys
import types

import pytest

NAMES = ["torchvision", *(f"torchvision.{name}" for name in ("datasets", "transforms"))]
NAMES.append("torchvision.transforms.functional")


class _Missing(types.ModuleType):
    __path__ = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}", object)


# Only while torch-fidelity is imported: others ask whether torchvision is there.
stubs = [] if importlib.util.find_spec("torchvision") else NAMES
sys.modules.update({name: _Missing(name) for name in stubs})
try:
    torch_fidelity = pytest.importorskip("torch_fidelity")
finally:
    for name in stubs:
        del sys.modules[name]
