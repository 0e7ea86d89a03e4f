"""Inception score: closed forms, the groups of two conventions, and large logits."""

import numpy as np
import pytest
from scipy.special import softmax

from diffusion.evaluation.metrics import inception_score
from diffusion.evaluation.metrics.metric import Judged
from diffusion.evaluation.networks.network import Network
from diffusion.evaluation.sets import of_arrays

rng = np.random.default_rng(0)


def by_definition(logits):
    p = softmax(logits.astype(float), axis=1)
    return np.exp((p * np.log(p / p.mean(0))).sum(1).mean())


def test_certain_classes_count_and_uncertain_ones_do_not():
    sure = 2000 * np.tile(np.eye(10), (3, 1))
    one = np.zeros(30, int)
    assert inception_score.inception_scores([sure], one)[0] == pytest.approx(10, rel=1e-12)
    unsure = np.tile(rng.standard_normal(10), (30, 1))
    assert inception_score.inception_scores([unsure], one)[0] == pytest.approx(1, rel=1e-12)


def test_groups_are_scored_apart_however_they_are_cut():
    logits, groups = 3 * rng.standard_normal((90, 12)), rng.permutation(np.arange(90) % 4)
    expected = [by_definition(logits[groups == g]) for g in range(4)]
    for cuts in ([], [1, 50], [30, 60]):
        found = inception_score.inception_scores(np.split(logits, cuts), groups)
        np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_consecutive_groups_are_of_five_thousand():
    groups = inception_score.consecutive(12_000)
    np.testing.assert_array_equal(np.bincount(groups), [5000, 5000, 2000])
    assert (np.diff(groups) >= 0).all()


@pytest.mark.parametrize("count", [10, 37, 100])
def test_shuffled_groups_are_slices_of_a_permutation(count):
    order = np.random.RandomState(2020).permutation(count)
    groups = inception_score.shuffled(count)
    for i in range(10):
        members = order[i * count // 10 : (i + 1) * count // 10]
        np.testing.assert_array_equal(np.sort(members), np.flatnonzero(groups == i))
    with pytest.raises(ValueError, match="10 samples at least, got 9"):
        inception_score.shuffled(9)


def test_figures_of_both_conventions():
    logits = 3 * rng.standard_normal((100, 6))
    net = Network("net", lambda: None, ("logits",))
    samples = of_arrays("samples", {"logits": logits})
    found = inception_score.metric().measure(Judged(samples, lambda _: None, net))
    groups = inception_score.shuffled(100)
    split = [by_definition(logits[groups == g]) for g in range(10)]
    assert found["is_net"] == pytest.approx(by_definition(logits))
    assert found["is_net_split"] == pytest.approx(np.mean(split))
    assert found["is_net_split_std"] == pytest.approx(np.std(split))
    assert "100 do not fill" in found["is_net_note"]
