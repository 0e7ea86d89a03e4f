"""Independent classifiers: they judge a generative model, and are never fitted on its samples."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from diffusion.data import sources
from diffusion.data.sources import Source
from diffusion.specs import unknown


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A fitted classifier of images in [-1, 1].

    Attributes:
      name: for reports.
      predict: images [N, H, W, C] -> labels [N] int.
      features: images [N, H, W, C] -> [N, D], the space in which Fréchet distances are taken.
      feature_name: what the features are, for reports.
      accuracy: share of held-out real examples that it recognises, in 0..1; None if not measured.
      num_held_out: how many examples ``accuracy`` was measured on.
    """

    name: str
    predict: Callable[[np.ndarray], np.ndarray]
    features: Callable[[np.ndarray], np.ndarray]
    feature_name: str
    accuracy: float | None = None
    num_held_out: int = 0


CHOICES = ("digits_svc", "lenet5")


def make(name: str, weights: str = "") -> Callable[[Source], Classifier]:
    """Held-out examples -> the classifier of that name, with its accuracy on them.

    ``weights`` is LeNet-5's file.
    """
    if name not in CHOICES:
        raise unknown("classifier", name, CHOICES)
    if name == "digits_svc":
        return lambda held_out: digits_svc()
    if not Path(weights).is_file():
        raise ValueError(f"lenet5 needs weights, the path of an .npz; there is no file {weights!r}")
    return lambda held_out: measure(lenet5(weights), held_out)


def measure(classifier: Classifier, held_out: Source) -> Classifier:
    """``classifier`` with its accuracy on real examples that it was not fitted on."""
    data = held_out.all()
    accuracy = float(np.mean(classifier.predict(data["x"]) == data["label"]))
    return dataclasses.replace(classifier, accuracy=accuracy, num_held_out=len(held_out))


@functools.cache
def digits_svc() -> Classifier:
    """scikit-learn's SVC (RBF kernel) on the real training digits, [8, 8, 1]; 64 pixel features.

    Its accuracy is measured on the 500 real digits held out by ``sources.digits``.
    """
    from sklearn.svm import SVC

    train = sources.digits("train").all()
    svc = SVC(C=10.0).fit(_flat(train["x"]), train["label"])
    classifier = Classifier("SVC", lambda x: svc.predict(_flat(x)), _flat, "64 pixels")
    return measure(classifier, sources.digits("test"))


def lenet5(path: str | Path) -> Classifier:
    """LeNet-5 (LeCun et al., 1998) for MNIST from an ``.npz``; 84 features before the last layer.

    Layers: convolutions 6, 16, 120 (5 x 5, ReLU, 2 x 2 max-pooling after the first two), dense
    84 and 10, input 32 x 32 in [0, 1], enlarged bilinearly from 28 x 28. Takes [N, 28, 28, 1] in
    [-1, 1], or [N, 32, 32, 1], whose border of two pixels is cut off. The file has
    ``convnet.{c1,c3,c5}`` and ``fc.{f6,f7}``, each with ``.weight`` and ``.bias`` in PyTorch's
    layouts.
    """
    with np.load(path) as file:
        weights = {name: jnp.asarray(file[name]) for name in file.files}

    def run(x: np.ndarray, output: int) -> np.ndarray:
        if x.shape[1:] not in ((28, 28, 1), (32, 32, 1)):
            raise ValueError(f"LeNet-5 takes [N, 28, 28, 1] or [N, 32, 32, 1], got {x.shape}")
        parts = [_lenet5(weights, x[i : i + 1000])[output] for i in range(0, len(x), 1000)]
        return np.concatenate([np.asarray(part) for part in parts])

    predict, features = lambda x: run(x, 0).argmax(-1), lambda x: run(x, 1)
    return Classifier("LeNet-5", predict, features, "84 features of LeNet-5")


@jax.jit
def _lenet5(weights: dict[str, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Logits [N, 10] and features [N, 84]."""

    def conv(x: jax.Array, name: str) -> jax.Array:
        kernel = weights[f"{name}.weight"].transpose(2, 3, 1, 0)  # OIHW -> HWIO
        layout = ("NHWC", "HWIO", "NHWC")
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=layout)
        return jax.nn.relu(x + weights[f"{name}.bias"][None, None, None])

    def pool(x: jax.Array) -> jax.Array:
        return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")

    def dense(x: jax.Array, name: str) -> jax.Array:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"][None]

    x = (x[:, 2:30, 2:30] if x.shape[1] == 32 else x) / 2 + 0.5
    x = jax.image.resize(x, (len(x), 32, 32, 1), "bilinear")
    x = pool(conv(x, "convnet.c1"))  # [N, 14, 14, 6]
    x = pool(conv(x, "convnet.c3"))  # [N, 5, 5, 16]
    x = conv(x, "convnet.c5").reshape(len(x), 120)
    features = jax.nn.relu(dense(x, "fc.f6"))
    return dense(features, "fc.f7"), features


def _flat(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float32).reshape(len(x), -1)
