"""Config fields of networks and schedulers with wrong types or absurd sizes are refused by name."""

import pytest
from unet_cases import SD1

from diffusion.pretrained import models
from diffusion.pretrained.schedulers import from_diffusers
from diffusion.pretrained.schedulers.catalogue import DEFAULTS

JUNK = [None, True, -1, 10**9, 10**30, 1.5, float("nan"), "x", [], [[]], {}, [None], [1] * 1000]


@pytest.mark.parametrize(
    "field, value",
    [
        ("layers_per_block", 10**9),
        ("layers_per_block", "2"),
        ("layers_per_block", True),
        ("transformer_layers_per_block", [10**9, 1, 1, 1]),
        ("block_out_channels", [320] * 1000),
        ("block_out_channels", ["320", "640", "1280", "1280"]),
        ("cross_attention_dim", -768),
        ("norm_eps", "small"),
        ("flip_sin_to_cos", 1),
        ("norm_num_groups", 10**30),
        ("down_block_types", [1, 2, 3, 4]),
        ("sample_size", float("nan")),
    ],
)
def test_a_networks_config(field, value):
    with pytest.raises(ValueError, match=rf"unet/config\.json: .*{field}"):
        models.from_config(SD1 | {field: value}, "unet/config.json")


@pytest.mark.parametrize("name", DEFAULTS)
def test_a_schedulers_config(name):
    """Any junk in any field: refused, or without consequence."""
    for field in DEFAULTS[name]:
        for value in JUNK:
            try:
                from_diffusers({**DEFAULTS[name], "_class_name": name, field: value}, 4)
            except (ValueError, TypeError, ArithmeticError) as error:
                assert str(error), (field, value)  # callers name the field of the config


def test_a_class_that_is_no_name():
    for junk in JUNK:
        with pytest.raises(ValueError, match=r"names no class|not supported|expected one"):
            models.from_config({"architectures": junk})
