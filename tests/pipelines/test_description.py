"""model.json: what is written is read, and makes the same model."""

import json
from dataclasses import replace

import numpy as np
import pytest
import tiny_pipelines as tiny
from tiny_tokenizer import tiny_tokenizer

from diffusion.models.autoencoder import AutoencoderKL
from diffusion.pipelines import description
from diffusion.pipelines.description import Description
from diffusion.pipelines.pipeline import Defaults

UNET = dict(widths=(8, 16), blocks=1, attention=(0, "self"), num_heads=2, norm_groups=4)
CLASSIFIER = dict(widths=(8, 8), norm_groups=4)
DIT = dict(width=16, depth=1, heads=2, patch=2)
BASE = Description("unet", UNET, "cosine", "v", "auto", (8, 8, 1))
CAPTIONS = dict(tokens=9, vocabulary=(1, 5, 998, 999), captions=("a red cat", "ein Äffchen"))
KINDS = {
    "unet": replace(BASE, num_classes=3, class_names=("a", "b", "c"), null=False),
    "learned variance": replace(BASE, learned_variance=True, dtype="bfloat16"),
    "dit": replace(BASE, network="dit", fields=DIT, prediction="edm", sigma_data=0.7),
    "mlp": replace(BASE, network="mlp", fields={}, shape=(2,), view="points"),
    "classifier": replace(BASE, network="classifier", fields=CLASSIFIER, num_classes=10),
    "autoencoder": replace(
        BASE, network="autoencoder", fields=dict(widths=(8, 8), blocks=1, norm_groups=4)
    ),
    "captions": replace(
        BASE,
        network="dit",
        fields=DIT | dict(cross_attention=True, pooled=True),
        text=dict(width=16, depth=1, heads=2),
        schedule="rectified_flow",
        prediction="flow",
        sampler=Defaults("heun(final='euler')", "karras(rho=5)", 9, ("cfg(3)", "interval(0.1, 3)")),
        **CAPTIONS,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read(tmp_path, kind):
    d = KINDS[kind]
    if d.text:
        tiny_tokenizer(tmp_path / "theirs")
        d = replace(d, tokenizer=str(tmp_path / "theirs"))
    (tmp_path / "run").mkdir()
    description.write(tmp_path / "run", d)
    again = description.read(tmp_path / "run")
    if d.text:  # the run has a tokenizer of its own
        (tmp_path / "theirs").rename(tmp_path / "away")
        assert again.tokenizer == str(tmp_path / "run" / "tokenizer")
        cond, null = description.conditioner(again)({}, ["a red cat"])
        assert cond.tokens.shape == (1, 9) and not np.array_equal(cond.tokens, null.tokens)
        d = replace(d, tokenizer=again.tokenizer)
    assert again == d
    assert description.network(again) == description.network(d)
    assert description.schedule(again) == description.schedule(d)


def test_a_pretrained_network_and_an_autoencoder_are_read_from_their_folders(tmp_path):
    tiny.whole(folder=tmp_path / "sd")
    fields = {"path": str(tmp_path / "sd"), "remat": False}
    d = replace(
        BASE, network="pretrained", fields=fields, schedule="scaled_linear", prediction="eps"
    )
    d = replace(d, shape=(8, 8, 4), autoencoder=str(tmp_path / "sd" / "vae"))
    description.write(tmp_path, d)
    again = description.read(tmp_path)
    assert again == d
    pipeline = description.pipeline(again)
    assert pipeline.network.in_channels == 4 and pipeline.size == (16, 16)
    assert isinstance(pipeline.codec.network, AutoencoderKL)
    # An autoencoder that was moved is found beside model.json.
    (tmp_path / "sd" / "vae").rename(tmp_path / "autoencoder")
    moved = description.read(tmp_path)
    assert moved == replace(d, autoencoder=str(tmp_path / "autoencoder"))
    assert description.codec(moved) == pipeline.codec


def test_what_is_damaged_or_of_another_version_is_named(tmp_path):
    description.write(tmp_path, BASE)
    path = tmp_path / description.FILE
    content = json.loads(path.read_text())
    for text, message in [
        ("{", r"model\.json is damaged: it does not describe a model"),
        (json.dumps({**content, "format": 99}), r"of another version .* expected 1"),
        (json.dumps({**content, "colour": 1}), "damaged"),
        (json.dumps({k: v for k, v in content.items() if k != "shape"}), "damaged"),
        (json.dumps({**content, "network": "unett"}), "damaged.*unett"),
        (json.dumps({**content, "fields": 3}), "damaged"),
        ("[1]", "damaged"),
    ]:
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            description.read(tmp_path)
