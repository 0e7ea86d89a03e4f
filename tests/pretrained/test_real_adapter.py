"""A real adapter of Stable Diffusion 1.5, where it is there: every tensor, and changes by hand."""

from pathlib import Path

import numpy as np
import pytest
from adapter_cases import assert_close

from diffusion.adapters.low_rank.products import product
from diffusion.models import unet
from diffusion.models.clip import ClipText
from diffusion.pretrained import files
from diffusion.pretrained.adapters import layers, reading
from diffusion.pretrained.models import shapes

DATA = Path(__file__).resolve().parents[3] / "shared" / "data"
FILE = DATA / "weights" / "lora_disney_sd15_peft.safetensors"


@pytest.mark.skipif(not FILE.exists(), reason="the file is not here")
def test_every_tensor_of_a_real_lora():
    net = unet.sd15(in_channels=4, context_width=768)
    text = ClipText(width=768, heads=12, hidden=3072)
    table = layers.table(net, [text], {"network": shapes(net), "encoders": [shapes(text)]})
    tensors, read = files.open_file(FILE), reading.read(FILE, table)
    assert not read.unused
    assert not read.absent
    assert 2 * len(read.deltas) == len(tensors) == 384
    parts = [path.partition("/")[0] for path in read.deltas]
    assert (parts.count("network"), parts.count("encoders")) == (144, 48)
    for key in list(tensors)[::32]:
        if not key.endswith(".lora_A.weight"):
            continue
        stem = key.removesuffix(".lora_A.weight")
        layer = table.aliases[stem]
        down, up = (np.asarray(tensors[f"{stem}.lora_{x}.weight"], np.float64) for x in "AB")
        delta, shape = read.deltas[layer.paths["weight"]], layer.shapes["weight"]
        assert_close(product(delta, shape), (up @ down).reshape(shape))
    with pytest.raises(ValueError, match=r"made for Stable Diffusion 1 .*this model is SDXL"):
        reading.read(FILE, table._replace(context=2048))
