"""The classification objective: what it minimises, and what its network may not see."""

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import denoiser, predictions, schedules
from diffusion.data import sources
from diffusion.denoiser import on_schedule
from diffusion.evaluation.metrics.noisy_accuracy import accuracy_by_level
from diffusion.levels import NoiseLevel
from diffusion.models.noisy_classifier import NoisyClassifier
from diffusion.objectives.classification import Classification
from diffusion.objectives.objective import Context


class Prototypes:
    """Stands in for a network: logits -||c_in x - prototype||^2, times one parameter."""

    means = np.linspace(-1, 1, 3 * 4).reshape(3, 2, 2, 1)

    def init(self, key, x, time, cond):
        return {"params": jnp.float32(1.0)}

    def apply(self, variables, x, time, cond, train=False, rngs=None):
        error = (x[:, None] - self.means.astype(np.float32)) ** 2
        return -variables["params"] * error.sum((2, 3, 4))


OBJECTIVE = Classification(
    network=Prototypes(),
    schedule=schedules.cosine(),
    prediction=predictions.v,
    c_noise=denoiser.ddpm_index,
    stratify=64,
)
LABEL = np.arange(64, dtype=np.int32) % 3
X = Prototypes.means[LABEL].astype(np.float32)
BATCH = {"x": X, "label": LABEL}


def test_loss_is_the_cross_entropy_of_noised_examples():
    key = jax.random.key(0)
    loss = jax.jit(lambda params, batch, key: OBJECTIVE.loss(params, Context(), batch, key))
    zero, _ = loss({"network": jnp.float32(0)}, BATCH, key)
    np.testing.assert_allclose(zero, np.log(3), rtol=1e-5)  # nothing told apart
    some, metrics = loss({"network": jnp.float32(0.3)}, BATCH, key)
    assert some < zero and 0.5 < metrics["accuracy"] < 1
    part = {name: leaf[16:48] for name, leaf in BATCH.items()} | {"index": np.arange(16, 48)}
    rest = {n: np.concatenate([leaf[:16], leaf[48:]]) for n, leaf in BATCH.items()}
    rest["index"] = np.r_[:16, 48:64]
    halves = [loss({"network": jnp.float32(0.3)}, b, key)[0] for b in (part, rest)]
    np.testing.assert_allclose(np.mean(halves), some, rtol=1e-5)  # as on two devices


def test_accuracy_by_level_falls_to_chance():
    source = sources.from_arrays("prototypes", X, label=LABEL, num_classes=3)
    params = {"network": jnp.float32(1)}
    results = accuracy_by_level(OBJECTIVE, params, source, 5)
    accuracy = [r["accuracy"] for r in results]
    assert accuracy[0] > 0.95 and accuracy[-1] < 0.6 and np.all(np.diff(accuracy) <= 0.05)
    assert [round(r["t"], 6) for r in results] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_network_gives_logits_without_seeing_the_label():
    net = NoisyClassifier(widths=(8, 8), blocks=1, norm_groups=4, classes=3)
    objective = Classification(net, schedules.EDM(), predictions.edm, denoiser.log_sigma)
    x = np.zeros((4, 4, 4, 1), np.float32)
    batch = {"x": x, "label": np.zeros(4, np.int32)}
    params = jax.jit(objective.init)(jax.random.key(0), batch)
    assert "class_embedding" not in params["network"]
    levels = NoiseLevel(*(jnp.full(4, v, jnp.float32) for v in (2.0, 1.0, 2.0)))
    one = jax.tree.map(lambda a: a[0], levels)
    classify = jax.jit(lambda params, level: objective.classifier(params)(x, level))
    logits = classify(params, levels)
    assert logits.shape == (4, 3) and logits.dtype == jnp.float32
    np.testing.assert_allclose(classify(params, one), logits, atol=1e-5)


def test_on_schedule_keeps_the_example():
    """The noised example of one schedule is the other's, at its time, up to scale."""
    x0, noise = np.full((3, 2), 0.7, np.float32), np.full((3, 2), -0.4, np.float32)
    for here, there in [(schedules.EDM(), schedules.cosine()), (schedules.cosine(),) * 2]:
        level = jax.tree.map(jnp.float32, here(np.array([0.1, 0.5, 0.9])))
        wide = level.expand(2)
        x, other = on_schedule(there, wide.alpha * x0 + wide.sigma * noise, level)
        np.testing.assert_allclose(other.ratio, level.ratio, rtol=1e-4)
        wide = other.expand(2)
        np.testing.assert_allclose(x, wide.alpha * x0 + wide.sigma * noise, atol=1e-4)
    end = NoiseLevel(*map(jnp.float32, (1.0, 0.0, 1.0)))
    x, other = on_schedule(schedules.EDM(), noise, end)  # beyond sigma_max
    assert other.t == 80.0 and np.isfinite(x).all()
