"""CMMD: its definition in float64, zero for equal sets, tiles, and its sampling error."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from diffusion.evaluation.metrics import cmmd
from diffusion.evaluation.metrics.metric import Judged
from diffusion.evaluation.networks.network import Network
from diffusion.evaluation.sets import of_arrays

rng = np.random.default_rng(0)


def by_definition(a, b):
    a, b = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b))

    def mean(x, y):
        return np.exp(-cdist(x, y, "sqeuclidean") / 200).mean()

    return 1000 * (mean(a, a) + mean(b, b) - 2 * mean(a, b))


def test_figure_is_the_definition_in_float64_at_full_width(monkeypatch):
    monkeypatch.setattr(cmmd, "ROWS", 300)
    monkeypatch.setattr(cmmd, "COLUMNS", 700)
    a, b = rng.standard_normal((1000, 768)), rng.standard_normal((900, 768)) + 0.05
    assert cmmd.cmmd(a, b)[0] == pytest.approx(by_definition(a, b), abs=1e-6)


def test_two_points_have_a_closed_form_and_lengths_do_not_matter():
    a, b = np.array([[3.0, 0.0]]), np.array([[0.0, 0.1]])
    assert cmmd.cmmd(a, b)[0] == pytest.approx(2000 * (1 - np.exp(-2 / 200)), rel=1e-6)


def test_equal_sets_are_zero_in_any_order():
    a = rng.standard_normal((200, 16))
    assert cmmd.cmmd(a, a[::-1])[0] == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="0 and has no direction"):
        cmmd.cmmd(np.zeros((3, 2)), a[:, :2])
    with pytest.raises(ValueError, match="differ in size: 16 and 15"):
        cmmd.cmmd(a, a[:, 1:])


def test_interval_is_that_of_repeated_draws():
    net, real = Network("net", lambda: None), of_arrays("r", {"features": rng.random((500, 4))})
    found = []

    def given(_):
        return real

    for _ in range(150):
        samples = of_arrays("s", {"features": rng.random((200, 4)) + np.eye(4)[0] / 3})
        found.append(cmmd.metric().measure(Judged(samples, given, net)))
    figures, halves = ([f[n] for f in found] for n in ("cmmd_net", "cmmd_net_ci"))
    assert np.mean(halves) / 1.959964 == pytest.approx(np.std(figures), rel=0.15)
