"""Parity with diffusers' schedulers, option by option: the same network and noise, the same x."""

import inspect

import diffusers
import pytest
from diffusers_run import compare
from scheduler_cases import CASES, EXCEPTIONS

from diffusion.pretrained.schedulers import DEFAULTS

FLAT = [
    pytest.param({"_class_name": name, **config}, steps, arguments, id=f"{name}-{number}")
    for name, cases in CASES.items()
    for number, (config, steps, arguments) in enumerate(cases)
]


@pytest.mark.parametrize(("config", "steps", "arguments"), FLAT)
def test_parity(config, steps, arguments):
    assert compare(config, steps, **arguments) < 1e-4


@pytest.mark.parametrize("name", DEFAULTS)
def test_every_field_is_varied(name):
    kept = {
        field
        for field, default in DEFAULTS[name].items()
        if all(config.get(field, default) == default for config, _, _ in CASES[name])
    }
    assert kept <= EXCEPTIONS.get(name, set())


@pytest.mark.parametrize("name", DEFAULTS)
def test_fields_are_those_of_diffusers(name):
    signature = inspect.signature(getattr(diffusers, name).__init__).parameters
    theirs = {k: p.default for k, p in signature.items() if k not in ("self", "kwargs")}
    assert DEFAULTS[name] == theirs
