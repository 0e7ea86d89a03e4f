"""A support vector classifier of scikit-learn's digits."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

from diffusion.data import sources
from diffusion.evaluation.networks.network import Network


def digits_svc() -> Network:
    """scikit-learn's SVC (RBF kernel) fitted to the 1,297 training digits, [8, 8, 1].

    Its one output is "label" [B] int, the class that it takes an example for.
    """

    def predict(x: np.ndarray, _: Any) -> dict[str, np.ndarray]:
        if x.shape[1:] != (8, 8, 1):
            raise ValueError(f"digits_svc takes [N, 8, 8, 1], got {x.shape}")
        return {"label": _fitted().predict(x.reshape(len(x), -1))}

    return Network("digits_svc", lambda: predict, ("label",), pictures=False, batch=1000)


@cache
def _fitted() -> Any:
    from sklearn.svm import SVC

    train = sources.digits("train").all()
    return SVC(C=10.0).fit(train["x"].reshape(len(train["x"]), -1), train["label"])
