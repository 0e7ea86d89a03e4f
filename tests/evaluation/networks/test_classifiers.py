"""Classifiers: accuracy on held-out real data, and the layers they are made of."""

from pathlib import Path

import numpy as np
import pytest

from diffusion.data import mnist_cifar, sources
from diffusion.evaluation.networks.digits_svc import digits_svc
from diffusion.evaluation.networks.lenet5 import lenet5
from diffusion.evaluation.networks.network import Network

REAL = Path(__file__).resolve().parents[4] / "shared" / "data"
WEIGHTS = REAL / "weights" / "mnist_lenet5_acc991.npz"


def accuracy(network, source):
    real = source.all()
    return np.mean(network(real["x"], real["label"], ("label",))["label"] == real["label"])


def test_digits_svc_knows_held_out_digits():
    svc = digits_svc()
    held_out = accuracy(svc, sources.digits("test"))
    assert 0.98 < held_out < accuracy(svc, sources.digits("train"))  # which it was fitted on
    assert svc.about == {
        "network": "digits_svc",
        "weights": "",
        "preparation": "",
        "quantised": False,
    }


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
    lenet = lenet5(str(tmp_path / "lenet.npz"))
    x = rng.uniform(-1, 1, (7, 28, 28, 1)).astype(np.float32)
    enlarged = [
        np.asarray(Image.fromarray(i[..., 0] / 2 + 0.5).resize((32, 32), Image.BILINEAR)) for i in x
    ]
    features, logits = lenet_in_numpy(weights, np.stack(enlarged)[:, None])
    none = [None] * 7
    found = lenet(x, none, lenet.outputs)
    np.testing.assert_allclose(found["features"], features, atol=1e-4)
    assert found["label"].tolist() == logits.argmax(1).tolist()
    padded = np.pad(x, ((0, 0), (2, 2), (2, 2), (0, 0)), constant_values=-1)
    np.testing.assert_allclose(lenet(padded, none)["features"], features, atol=1e-4)
    with pytest.raises(ValueError, match=r"\(500, 8, 8, 1\)"):
        lenet(np.zeros((2, 8, 8, 1)), none)


def test_a_networks_weights_are_named_and_checked(tmp_path):
    weights = random_weights(np.random.default_rng(0))
    np.savez(tmp_path / "a.npz", **weights)
    np.savez(tmp_path / "b.npz", **weights | {"fc.f7.bias": np.zeros(10, np.float32)})
    a, b = (lenet5(str(tmp_path / f"{name}.npz")) for name in "ab")
    assert a.key != b.key and a.key == lenet5(str(tmp_path / "a.npz")).key
    assert len(a.checksum) == 16 and a.about["weights"] == a.checksum
    with pytest.raises(ValueError, match=r"lenet5 needs the file of its weights.*'nowhere.npz'"):
        lenet5("nowhere.npz")
    del weights["convnet.c3.bias"]
    np.savez(tmp_path / "c.npz", **weights)
    with pytest.raises(ValueError, match=r"c.npz.*convnet.c3.bias"):
        lenet5(str(tmp_path / "c.npz"))(np.zeros((2, 28, 28, 1)), [0, 0])


def test_the_last_batch_is_filled_up_and_cut_again():
    seen = []

    def run(x, subjects):
        seen.append((x.shape, x.dtype, list(subjects)))
        return {"features": x.reshape(len(x), -1).astype(np.float32)}

    net = Network("mean", lambda: run, batch=4)
    x = np.linspace(-1, 1, 6 * 4).reshape(6, 2, 2, 1).astype(np.float32)
    features = net(x, list("abcdef"))["features"]
    shapes = [(shape, kind) for shape, kind, _ in seen]
    assert shapes == [((4, 2, 2, 3), np.uint8)] * 2
    assert [subjects for _, _, subjects in seen] == [list("abcd"), list("efff")]
    np.testing.assert_array_equal(
        features.reshape(6, 4, 3)[..., 0], np.round((x + 1) * 127.5).reshape(6, 4)
    )
    np.testing.assert_array_equal(
        net(np.round((x + 1) * 127.5).astype(np.uint8), [0] * 6)["features"], features
    )
    with pytest.raises(ValueError, match=r"mean judges pictures \[N, H, W, 1 or 3\], got \(3, 2\)"):
        net(np.zeros((3, 2)), [0] * 3)
    broken = Network("broken", lambda: lambda x, _: {"features": np.full((len(x), 1), np.nan)})
    with pytest.raises(ValueError, match=r"broken: features contain NaN"):
        broken(x, [0] * 6)


@pytest.mark.skipif(not WEIGHTS.exists(), reason="the trained LeNet-5 is absent")
def test_trained_lenet5_has_its_published_accuracy():
    test = mnist_cifar.mnist("test", REAL / "mnist")
    assert round(accuracy(lenet5(str(WEIGHTS)), test), 3) == 0.991
