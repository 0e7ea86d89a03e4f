"""Measures of text-to-image models, on models and pictures whose values are known."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import predictions, schedules
from diffusion.data import sources
from diffusion.denoiser import ddpm_index
from diffusion.evaluation.metrics.caption_gap import caption_gap
from diffusion.evaluation.metrics.retrieval import retrieval
from diffusion.pipelines.conditioners import Captions
from diffusion.pipelines.pipeline import Pipeline

CAPTIONS = ("0", "1", "2", "2", "3")


class Reader(nn.Module):
    """Predicts x_0 as ``gain`` times the number that the caption is."""

    gain: float

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        self.param("unused", nn.initializers.zeros, (1,))
        value = self.gain * cond.tokens[:, 0].astype(jnp.float32)
        return jnp.broadcast_to(value[:, None, None, None], x.shape)


def tokenize(captions):
    return {"tokens": np.array([[int(c) if c else 5] for c in captions], np.int32)}


def source():
    images = np.zeros((5, 2, 2, 1), np.uint8)
    made = sources.from_arrays("numbers", images)
    numbers = np.array([float(c) for c in CAPTIONS], np.float32)

    def read(index):
        x = np.broadcast_to(numbers[index][:, None, None, None], (len(index), 2, 2, 1))
        return {"x": np.array(x)} | tokenize([CAPTIONS[i] for i in index])

    return dataclasses.replace(made, read=read, captions=CAPTIONS, encode=tokenize, vocabulary=6)


def gap_of(gain):
    pipeline = Pipeline(
        "run",
        Reader(gain),
        schedules.cosine(),
        predictions.x0,
        ddpm_index,
        (2, 2, 1),
        conditioner=Captions(tokenize),
    )
    params = {"network": {"unused": np.zeros(1)}}
    return caption_gap(pipeline, params, source(), draws=2, batch_size=3)


def test_a_model_that_reads_its_captions_has_a_gap():
    result = gap_of(1.0)
    assert result["loss"] == 0 and result["own_preferred"] == 1
    # With no caption this one says 5.
    expected = np.mean([(5 - int(c)) ** 2 for c in CAPTIONS])
    assert result["loss_empty"] == pytest.approx(expected)
    assert result["gap"] == pytest.approx(result["loss_other"]) and result["gap"] >= 1
    assert result["count"] == 5 and 0 < result["gap_ci"] < 20


def test_a_model_that_does_not_has_none():
    result = gap_of(0.0)
    assert result["gap"] == result["gap_ci"] == result["own_preferred"] == 0
    assert result["loss"] == pytest.approx(np.mean([int(c) ** 2 for c in CAPTIONS]))


def test_one_caption_cannot_be_exchanged():
    lone = dataclasses.replace(source(), captions=("0",) * 5)
    with pytest.raises(ValueError, match="at least two captions"):
        caption_gap(None, None, lone)


def test_retrieval_finds_equal_pictures_and_nothing_in_noise():
    rng = np.random.default_rng(0)
    names = [f"caption {i}" for i in range(50)]
    real = rng.normal(size=(60, 3, 3, 1))
    captions = [*names, *names[:10]]  # ten have two pictures
    found = retrieval(real[::-1], captions[::-1], real, captions)
    assert found["first"] == 1 and found["mean_rank"] == 0 and found["captions"] == 50
    noise = retrieval(rng.normal(size=(2000, 3, 3, 1)), 40 * names, real, captions)
    assert noise["first"] == pytest.approx(noise["first_by_chance"], abs=0.012)
    assert noise["among_10"] == pytest.approx(noise["among_10_by_chance"], abs=0.03)
    assert noise["mean_rank"] == pytest.approx(0.5, abs=0.02)
    # The second picture of a caption counts as much as the first.
    second = retrieval(real[50:], names[:10], real, captions)
    assert second["first"] == 1


def test_retrieval_of_pictures_that_are_all_the_same_is_chance():
    names, same = [str(i) for i in range(20)], np.full((20, 3), 0.1)
    found = retrieval(same, names, same, names)
    assert found["first"] == pytest.approx(1 / 20) == found["first_by_chance"]
    assert found["among_10"] == pytest.approx(10 / 20) == found["among_10_by_chance"]
    assert found["mean_rank"] == pytest.approx(0.5)


def test_retrieval_is_that_of_all_distances(monkeypatch):
    monkeypatch.setattr("diffusion.evaluation.metrics.retrieval.ROWS", 7)
    rng = np.random.default_rng(0)
    drawn, real = (1e3 + rng.normal(size=(n, 2, 2)) for n in (30, 50))
    captions = [str(i) for i in rng.permutation(50) % 12]
    prompts = [str(i) for i in rng.integers(0, 12, 30)]
    found = retrieval(drawn, prompts, real, captions)
    ranks = []
    for x, own in zip(drawn, prompts, strict=True):
        apart = ((real - x) ** 2).sum((1, 2))
        least = {c: min(apart[[d == c for d in captions]]) for c in captions}
        ranks.append(sum(value < least[own] for value in least.values()))
    assert found["first"] == np.mean(np.array(ranks) == 0)
    assert found["among_10"] == np.mean(np.array(ranks) < 10)
    assert found["mean_rank"] == pytest.approx(np.mean(ranks) / 11)
