"""Classifiers: accuracy on held-out real data, and the layers they are made of."""

from pathlib import Path

import numpy as np
import pytest

from diffusion.data import mnist_cifar, sources
from diffusion.evaluation import classifiers

REAL = Path(__file__).resolve().parents[3] / "shared" / "data"
WEIGHTS = REAL / "weights" / "mnist_lenet5_acc991.npz"


def test_digits_svc_states_its_accuracy_on_held_out_digits():
    svc = classifiers.digits_svc()
    assert svc.accuracy > 0.98
    assert svc.num_held_out == 500
    test = sources.digits("test").all()
    assert np.mean(svc.predict(test["x"]) == test["label"]) == svc.accuracy
    assert svc.features(test["x"]).shape == (500, 64)
    # It has not seen them: what it was fitted on it knows better.
    train = sources.digits("train").all()
    assert np.mean(svc.predict(train["x"]) == train["label"]) > svc.accuracy


def random_weights(rng):
    shapes = {
        "convnet.c1": (6, 1, 5, 5),
        "convnet.c3": (16, 6, 5, 5),
        "convnet.c5": (120, 16, 5, 5),
        "fc.f6": (84, 120),
        "fc.f7": (10, 84),
    }
    weights = {}
    for name, shape in shapes.items():
        fan_in = np.prod(shape[1:])
        weights[f"{name}.weight"] = rng.standard_normal(shape) / np.sqrt(fan_in)
        weights[f"{name}.bias"] = 0.1 * rng.standard_normal(shape[0])
    return {name: value.astype(np.float32) for name, value in weights.items()}


def lenet_in_numpy(w, x):
    """x [N, 1, 32, 32] in [0, 1] -> features, logits; PyTorch's layout, written out."""

    def conv(x, name):
        windows = np.lib.stride_tricks.sliding_window_view(x, (5, 5), axis=(2, 3))
        y = np.einsum("nihwab,oiab->nohw", windows, w[f"{name}.weight"])
        return np.maximum(y + w[f"{name}.bias"][:, None, None], 0)

    def pool(x):
        n, c, h, width = x.shape
        return x.reshape(n, c, h // 2, 2, width // 2, 2).max((3, 5))

    x = conv(pool(conv(pool(conv(x, "convnet.c1")), "convnet.c3")), "convnet.c5")[:, :, 0, 0]
    features = np.maximum(x @ w["fc.f6.weight"].T + w["fc.f6.bias"], 0)
    return features, features @ w["fc.f7.weight"].T + w["fc.f7.bias"]


def test_lenet5_computes_its_layers(tmp_path):
    from PIL import Image

    rng = np.random.default_rng(0)
    weights = random_weights(rng)
    np.savez(tmp_path / "lenet.npz", **weights)
    lenet = classifiers.lenet5(tmp_path / "lenet.npz")
    x = rng.uniform(-1, 1, (7, 28, 28, 1)).astype(np.float32)
    enlarged = [
        np.asarray(Image.fromarray(i[..., 0] / 2 + 0.5).resize((32, 32), Image.BILINEAR)) for i in x
    ]
    features, logits = lenet_in_numpy(weights, np.stack(enlarged)[:, None])
    np.testing.assert_allclose(lenet.features(x), features, atol=1e-4)
    assert lenet.predict(x).tolist() == logits.argmax(1).tolist()
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)
    np.testing.assert_allclose(lenet.features(padded), features, atol=1e-4)
    with pytest.raises(ValueError, match=r"\(2, 8, 8, 1\)"):
        lenet.predict(np.zeros((2, 8, 8, 1)))


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the trained LeNet-5 is absent")
def test_trained_lenet5_has_its_published_accuracy():
    test = mnist_cifar.mnist("test", REAL / "mnist")
    lenet = classifiers.measure(classifiers.lenet5(WEIGHTS), test)
    assert round(lenet.accuracy, 3) == 0.991
    assert lenet.num_held_out == 10_000
    assert lenet.features(test.read(np.arange(3))["x"]).shape == (3, 84)
