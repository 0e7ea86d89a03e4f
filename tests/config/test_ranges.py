"""Every number of every field is looked at before anything is built."""

import re
import sys

import pytest

from configs import base, digits, toy2d
from diffusion.config import ranges


def numeric(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


FIELDS = {name: value for name, value in ranges._fields(base.get_config()) if numeric(value)}


def refused(name, value):
    config = base.get_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=rf"^config\.{re.escape(name)} must "):
        ranges.check(config)


def test_no_field_may_be_nan_or_far_below_zero():
    assert len(FIELDS) > 80
    for name, value in FIELDS.items():
        if isinstance(value, float):
            refused(name, float("nan"))
        if "time_freq_shift" not in name:
            refused(name, type(value)(-1e9))


def test_the_defaults_and_the_configs_pass():
    for module in (base, digits, toy2d):
        ranges.check(module.get_config())


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("train.batch_size", 0, "must be positive, got 0"),
        ("train.max_skipped", -1, "must be >= 0, got -1"),
        ("train.validation_count", 0, "must be positive"),
        ("optimizer.learning_rate", float("inf"), "must be a finite number, got inf"),
        ("optimizer.b2", 1.0, r"must lie in \[0, 1\), got 1\.0"),
        ("optimizer.warmup", -5, "must be >= 0"),
        ("objective.label_dropout", 1.5, r"must lie in \[0, 1\], got 1\.5"),
        ("objective.t_min", float("nan"), "must be a finite number"),
        ("model.unet.widths", (32, 0), r"must be positive, got \(32, 0\)"),
        ("model.unet.attention", (0, -1), "must be >= 0"),
        ("model.dit.dropout", 1.0, r"must lie in \[0, 1\)"),
        ("model.unet.blocks", 10**9, "must be at most 10,000"),
        ("model.unet.attention_implementation", "flash", "expected one of None, 'xla', 'cudnn'"),
        ("model.unet.attention_implementation", "cudnn", "needs an NVIDIA GPU, and this is a cpu"),
        ("sampler.steps", 10**9, "must be at most 10,000, got 1000000000"),
        ("sampler.seed", -1, "must be >= 0"),
        ("data.background", (0, 0), "expected three whole numbers from 0 to 255"),
        ("data.held_out", 1.0, r"must lie in \[0, 1\)"),
        ("profile.steps", 0, "must be positive"),
        ("log.peak_tflops", -1.0, "must be >= 0"),
    ],
)
def test_mistakes_are_named(name, value, message):
    config = base.get_config()
    config.update_from_flattened_dict({name: value})
    with pytest.raises(ValueError, match=rf"^config\.{re.escape(name)}.*{message}"):
        ranges.check(config)


def test_wandb_must_be_there(monkeypatch):
    config = base.get_config()
    config.log.wandb = "project"
    monkeypatch.setattr(ranges, "wandb_installed", lambda: False)
    with pytest.raises(ValueError, match=r"config\.log\.wandb='project' needs .*pip install wandb"):
        ranges.check(config)
    monkeypatch.setattr(ranges, "wandb_installed", lambda: True)
    ranges.check(config)
    assert "wandb" not in sys.modules
