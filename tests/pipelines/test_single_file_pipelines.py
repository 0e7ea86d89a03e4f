"""Pipelines as single files: diffusers' loader reads ours, and so do we."""

import logging
from functools import cache

import diffusers
import jax
import numpy as np
import pytest
import tiny_pipelines as tiny
import torch
from tiny_tokenizer import tiny_tokenizer

from diffusion.pipelines.from_pretrained import open_pipeline
from diffusion.pipelines.from_single_file import open_checkpoint, save_checkpoint
from diffusion.pretrained import files, models
from diffusion.pretrained.schedulers import catalogue as schedulers

logging.getLogger("diffusers").setLevel(logging.ERROR)
KINDS = {"v1": "StableDiffusionPipeline", "xl_base": "StableDiffusionXLPipeline"}


shapes = cache(models.shapes)


@pytest.fixture(autouse=True)
def known_shapes(monkeypatch):
    """Tracing takes most of the time here: once a module."""
    for where in ("models", "single_file.checkpoint"):
        monkeypatch.setattr(f"diffusion.pretrained.{where}.shapes", shapes)


def tokenizer(pad):
    return tiny_tokenizer(pad=pad)


@pytest.mark.parametrize("family", KINDS)
def test_single_files_are_those_of_diffusers(tmp_path, family):
    kind, file = KINDS[family], tmp_path / "one.safetensors"
    wanted = tiny.whole(kind, tmp_path / "theirs")
    opened = open_pipeline(tmp_path / "theirs")
    pipeline, params = opened.pipeline, opened.load()
    save_checkpoint(file, family, pipeline, params)

    theirs = getattr(diffusers, kind).from_single_file(
        str(file), config=str(tmp_path / "theirs"), local_files_only=True
    )
    # diffusers tells SDXL's encoders apart by their widths, which are equal here.
    for name in opened.models.keys() - {"text_encoder_2"}:
        before, after = getattr(wanted, name).state_dict(), getattr(theirs, name).state_dict()
        assert before.keys() == after.keys()
        for key in before:
            assert torch.equal(before[key], after[key]), f"{name}: {key}"

    modules = {name: model.module for name, model in opened.models.items()}
    ours = open_checkpoint(file, tokenizer, modules=modules)
    jax.tree.map(np.testing.assert_array_equal, ours.load(), params)
    assert ours.pipeline.kind == kind
    assert ours.pipeline.network == pipeline.network
    ours_of, theirs_of = ours.pipeline.conditioner, pipeline.conditioner
    assert ours_of.encoders == theirs_of.encoders and ours_of.zeros == theirs_of.zeros
    pads, their_pads = ([t.pad_token for t in c.tokenizers] for c in (ours_of, theirs_of))
    assert pads == their_pads
    schedulers.read(ours.pipeline.scheduler)


def test_a_file_without_a_part_is_no_pipeline(tmp_path):
    tiny.whole(folder=tmp_path / "theirs")
    opened = open_pipeline(tmp_path / "theirs")
    modules = {name: model.module for name, model in opened.models.items()}
    save_checkpoint(tmp_path / "whole.safetensors", "v1", opened.pipeline, opened.load())
    tensors = files.open_file(tmp_path / "whole.safetensors")
    kept = {key: t for key, t in tensors.items() if not key.startswith("first_stage_model.")}
    files.write_file(tmp_path / "bare.safetensors", kept)
    with pytest.raises(ValueError, match="a checkpoint of v1 without vae"):
        open_checkpoint(tmp_path / "bare.safetensors", tokenizer, modules=modules)
