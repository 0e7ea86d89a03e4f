"""KID, inception score, Fréchet distance, precision and recall against torch-fidelity's own."""

import importlib.util
import sys
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest

from diffusion.evaluation.metrics import frechet, inception_score
from diffusion.evaluation.metrics.kid import kid
from diffusion.evaluation.metrics.precision_recall import precision_recall
from diffusion.evaluation.moments import moments

torch = pytest.importorskip("torch")
PARTS = ("datasets", "transforms", "transforms.functional", "models")
rng = np.random.default_rng(0)


@pytest.fixture(scope="module")
def fidelity():
    """torch-fidelity, without the torchvision that its figures of features do not use."""
    names = ("torchvision", *(f"torchvision.{part}" for part in PARTS))
    absent = [name for name in names if importlib.util.find_spec("torchvision") is None]
    with pytest.MonkeyPatch.context() as patch:
        for name in absent:
            patch.setitem(sys.modules, name, MagicMock())
        pytest.importorskip("torch_fidelity")
        from torch_fidelity import metric_fid, metric_isc, metric_kid, metric_prc

    return SimpleNamespace(fid=metric_fid, isc=metric_isc, kid=metric_kid, prc=metric_prc)


def pair(n=400, m=300, d=24):
    x, y = rng.standard_normal((n, d)) * 1.2 + 0.3, rng.standard_normal((m, d))
    return x.astype(np.float32), y.astype(np.float32)


def test_frechet_distance(fidelity):
    x, y = pair()
    given = [{"mu": m.mean, "sigma": m.cov} for m in (moments([x]), moments([y]))]
    expected = fidelity.fid.fid_statistics_to_metric(*given, verbose=False)
    expected = expected["frechet_inception_distance"]
    assert frechet.frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_on_the_same_subsets(fidelity):
    x, y = pair()
    options = {"kid_subsets": 20, "kid_subset_size": 100, "verbose": False}
    expected = fidelity.kid.kid_features_to_metric(*map(torch.from_numpy, (x, y)), **options)
    found = kid(x, y, subsets=20, size=100)
    mean, std = (expected[f"kernel_inception_distance_{name}"] for name in ("mean", "std"))
    assert found.mean == pytest.approx(mean, rel=1e-5)
    assert found.std == pytest.approx(std, rel=1e-4)


def test_inception_score_with_the_same_shuffle(fidelity):
    logits = (3 * rng.standard_normal((333, 20))).astype(np.float32)
    expected = fidelity.isc.isc_features_to_metric(torch.from_numpy(logits), 10, True, 2020)
    found = inception_score.inception_scores([logits], inception_score.shuffled(333))
    assert found.mean() == pytest.approx(expected["inception_score_mean"], rel=1e-10)
    assert found.std() == pytest.approx(expected["inception_score_std"], rel=1e-8)


def test_precision_and_recall(fidelity):
    x, y = pair()
    options = {"prc_neighborhood": 3, "prc_batch_size": 128, "save_cpu_ram": True}
    given = [torch.from_numpy(a) for a in (x, y)]
    expected = fidelity.prc.prc_features_to_metric(*given, verbose=False, **options)
    precise, recalled = precision_recall(x, y)
    assert precise.mean() == pytest.approx(expected["precision"], abs=1e-6)
    assert recalled.mean() == pytest.approx(expected["recall"], abs=1e-6)
