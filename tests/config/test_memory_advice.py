import re

import jax
import pytest

from configs import base, digits, imagenet256_dit_xl2
from diffusion.config import memory_advice

ERRORS = {  # as jaxlib and NumPy say it, and the bytes
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 17179869184 bytes.": 16,
    "INTERNAL: Error dispatching computation: Out of memory allocating 2147483648 bytes.": 2,
    "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 13.25GiB.": 13.25,
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 30.50G of 15.48G hbm.": 30.5,
    "RESOURCE_EXHAUSTED: the device is full": None,
}


@pytest.mark.parametrize("text, size", ERRORS.items())
def test_devices_out_of_memory(text, size):
    with (
        pytest.raises(memory_advice.OutOfMemoryError) as raised,
        memory_advice.explained(digits.get_config(), "train"),
    ):
        raise jax.errors.JaxRuntimeError(text)
    first, *others = str(raised.value).splitlines()
    asked = "" if size is None else f": an allocation of {size:.3g} GiB failed"
    assert first.startswith(f"out of memory: this process has not enough{asked}")
    fields = [
        found[1] for found in (re.match(r"  config\.([\w.]+)=", line) for line in others) if found
    ]
    assert fields == [
        "train.batch_size",
        "train.accumulate",
        "model.dtype",
        "model.unet.remat",
        *(["parallel"] if "parallel" in digits.get_config() else []),
        "optimizer.name",
        "sampler.batch_size",
        "sampler.guidance",
    ]
    assert "config.train.batch_size=64:" in others[0]
    assert "goes on from the last one" in others[-1]


def test_the_host_out_of_memory():
    with (
        pytest.raises(memory_advice.OutOfMemoryError, match=r"3\.73 GiB .*(?s:.*)config\.sampler"),
        memory_advice.explained(digits.get_config(), "sample"),
    ):
        raise MemoryError("Unable to allocate 3.73 GiB for an array with shape (1000000000,)")


def test_only_fields_that_would_help_are_named():
    config = imagenet256_dit_xl2.get_config()
    config.model.dtype, config.model.dit.remat = "bfloat16", True
    config.optimizer.name = "sgd"
    text = memory_advice.message(MemoryError(), config, "train")
    assert not re.search(r"dtype|remat|optimizer", text)
    text = memory_advice.message(MemoryError(), base.get_config(), "generate")
    assert re.search(r"config\.model\.tile=0(?s:.*)config\.samples\.height=0", text)
    assert "train" not in text and "config.sampler.batch_size=0" in text


def test_other_errors_pass():
    with (
        pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL: cuDNN"),
        memory_advice.explained(digits.get_config(), "train"),
    ):
        raise jax.errors.JaxRuntimeError("INTERNAL: cuDNN failed")
