import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import PREDICTIONS, SCHEDULES

from diffusion import predictions, schedules
from diffusion.conditioning import Conditioning, null_like
from diffusion.denoiser import ddpm_index, log_sigma, thousand_t
from diffusion.objectives import times, weightings
from diffusion.objectives.denoising import Denoising
from diffusion.objectives.distances import pseudo_huber
from diffusion.objectives.dropout import together
from diffusion.objectives.noise import Gaussian
from diffusion.objectives.objective import Context
from diffusion.objectives.terms.uncertainty import Uncertainty


class PointMass(nn.Module):
    """The ideal network when all data are one point: it knows x_0, and solves x_t for eps."""

    point: float
    schedule: schedules.Schedule
    prediction: predictions.Prediction

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        self.param("unused", nn.initializers.zeros, (1,))
        level = self.schedule(time)  # c_noise is the time itself in these tests
        row = self.prediction(level.expand(x.ndim))
        level = level.expand(x.ndim)
        noise = (x / row.c_in - level.alpha * self.point) / level.sigma
        return row.a * self.point + row.b * noise


class Affine(nn.Module):
    """A network with one weight per input channel, enough to have gradients."""

    channels: int

    @nn.compact
    def __call__(self, x, time, cond, train=False):
        shift = 0.0 if cond.label is None else cond.label[:, None].astype(x.dtype)
        return nn.Dense(self.channels)(x) + 0.1 * jnp.tanh(shift)


def time_itself(level):
    return level.t


@pytest.mark.parametrize("prediction", PREDICTIONS)
# Shifted schedules' levels carry the moved times, which this network cannot undo.
@pytest.mark.parametrize(
    "schedule", [n for n, s in SCHEDULES.items() if not isinstance(s, schedules.Shifted)]
)
def test_perfect_network_has_no_loss(schedule, prediction):
    s, p = SCHEDULES[schedule], PREDICTIONS[prediction]
    objective = Denoising(PointMass(0.4, s, p), s, p, time_itself, t_min=0.01 * s.t_max)
    batch = {"x": np.full((64, 3), 0.4, np.float32)}
    params = objective.init(jax.random.key(0), batch)
    loss, _ = objective.loss(params, Context(), batch, jax.random.key(1))
    assert float(loss) < 1e-6
    off = Denoising(PointMass(0.9, s, p), s, p, time_itself, t_min=0.01 * s.t_max)
    assert float(off.loss(params, Context(), batch, jax.random.key(1))[0]) > 1e-3


def affine_objective(**overrides):
    defaults = dict(
        network=Affine(2),
        schedule=schedules.cosine(),
        prediction=predictions.v,
        c_noise=ddpm_index,
    )
    return Denoising(**(defaults | overrides))


def batch_of(n):
    rng = np.random.default_rng(0)
    return {
        "x": rng.normal(size=(n, 2)).astype(np.float32),
        "label": rng.integers(0, 3, n).astype(np.int32),
        "index": np.arange(n, dtype=np.int32),
    }


@pytest.mark.parametrize("stratify", [None, 8])
def test_loss_does_not_depend_on_how_the_batch_is_split(stratify):
    objective = affine_objective(
        stratify=stratify,
        dropout=partial(together, rate=0.5),
        null=lambda cond: null_like(cond, label=3),
    )
    batch = batch_of(8)
    params = objective.init(jax.random.key(0), batch)
    whole, _ = objective.loss(params, Context(), batch, jax.random.key(1))
    halves = [
        objective.loss(
            params, Context(), {k: v[i : i + 4] for k, v in batch.items()}, jax.random.key(1)
        )
        for i in (0, 4)
    ]
    assert float(whole) == pytest.approx(np.mean([float(h[0]) for h in halves]), rel=1e-6)


def test_dropout_uses_the_null_label_at_its_rate():
    class Echo(nn.Module):
        """Its output is 1 exactly for examples that got the null label."""

        @nn.compact
        def __call__(self, x, time, cond, train=False):
            self.param("unused", nn.initializers.zeros, (1,))
            return jnp.zeros_like(x) + (cond.label[:, None] == 3)

    objective = affine_objective(
        network=Echo(),
        prediction=predictions.x0,
        dropout=partial(together, rate=0.3),
        null=lambda cond: null_like(cond, label=3),
    )
    batch = batch_of(4000) | {"x": np.zeros((4000, 2), np.float32)}
    loss, _ = objective.loss(
        objective.init(jax.random.key(0), batch), Context(), batch, jax.random.key(2)
    )
    assert float(loss) == pytest.approx(0.3, abs=0.03)


def test_every_combination_gives_finite_gradients():
    batch = batch_of(16)
    for schedule in ("cosine", "zero_terminal_snr", "edm", "rectified_flow"):
        for prediction in PREDICTIONS.values():
            objective = affine_objective(
                schedule=SCHEDULES[schedule],
                prediction=prediction,
                c_noise=log_sigma if schedule == "edm" else thousand_t,
                times=times.discrete if schedule == "zero_terminal_snr" else times.log_normal,
                distance=pseudo_huber,
                weighting=partial(weightings.min_snr, gamma=3.0),
                terms=(Uncertainty(),),
            )
            if prediction is predictions.eps and schedule == "zero_terminal_snr":
                continue  # c_out is infinite there; refused by the configuration
            params = objective.init(jax.random.key(0), batch)
            grads = jax.grad(
                lambda p, o=objective: o.loss(p, Context(), batch, jax.random.key(1))[0]
            )(params)
            assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves(grads)), schedule


def test_learned_uncertainty_converges_to_the_log_loss():
    """The minimum of L exp(-u) + u over u is at u = log L, whatever the level."""
    objective = affine_objective(terms=(Uncertainty(),), schedule=schedules.RectifiedFlow())
    batch = batch_of(256)
    params = objective.init(jax.random.key(0), batch)
    params["network"] = jax.tree.map(jnp.zeros_like, params["network"])
    plain = dataclasses.replace(objective, terms=())

    def descend(u, step):
        def loss(u):
            parameters = {**params, "uncertainty": u}
            return objective.loss(parameters, Context(), batch, jax.random.fold_in(key, step))[0]

        rate = 0.02 * (1 - step / 1500)
        return jax.tree.map(lambda p, g: p - rate * g, u, jax.grad(loss)(u)), None

    key = jax.random.key(1)
    u, _ = jax.jit(lambda u: jax.lax.scan(descend, u, jnp.arange(1500)))(params["uncertainty"])
    level = objective.schedule(jnp.linspace(0.1, 0.9, 9))
    learned = objective.terms[0].log_variance(u, level)
    # A zero network's loss on v is E[v^2] = alpha^2 + sigma^2 (unit data), labels' shift apart.
    losses = [
        float(
            dataclasses.replace(plain, times=lambda u, s, t=t: jnp.full_like(u, t)).loss(
                params, Context(), batch, jax.random.key(9)
            )[0]
        )
        for t in np.linspace(0.1, 0.9, 9)
    ]
    np.testing.assert_allclose(learned, np.log(losses), atol=0.12)


def test_every_term_leaves_a_quarter_of_the_examples_in_each_quartile():
    objective = affine_objective(stratify=64, terms=(Uncertainty(),))
    batch, key = batch_of(64), jax.random.key(4)
    params = objective.init(key, batch)
    params["uncertainty"] = jax.tree.map(lambda p: p + 0.3, params["uncertainty"])
    loss, metrics = objective.loss(params, Context(), batch, key)
    total, weight = metrics["loss_q"]
    np.testing.assert_array_equal(weight, 0.25)
    assert float(total.sum()) == pytest.approx(float(loss), rel=1e-5)


def test_terms_act_one_after_another_and_samplers_know_nothing_of_them():
    @dataclasses.dataclass(frozen=True)
    class Scaled:
        """A term with one parameter, which multiplies and adds."""

        name: str
        factor: float
        blocks = ()

        def init(self, key, noised):
            assert noised.x0_hat.shape == (8, 2) and noised.level.t.shape == (8,)
            return {"shift": jnp.ones(())}

        def __call__(self, loss, params, context, noised):
            assert context.step == 5 and noised.x0_hat.shape == noised.x_t.shape
            return self.factor * loss + params["shift"], {self.name: loss.mean()}

    first, second, batch = Scaled("first", 3.0), Scaled("second", 2.0), batch_of(8)
    objective = affine_objective(terms=(first, second))
    params, context = objective.init(jax.random.key(0), batch), Context(step=5)
    assert set(params) == {"network", "first", "second"}
    assert set(objective.network_params(params)) == {"network"}
    loss, metrics = objective.loss(params, context, batch, jax.random.key(1))
    plain, _ = affine_objective().loss(params, context, batch, jax.random.key(1))
    assert float(loss) == pytest.approx(2 * (3 * float(plain) + 1) + 1, rel=1e-6)
    assert float(metrics["second"]) == pytest.approx(3 * float(plain) + 1, rel=1e-6)
    level = objective.schedule(jnp.full(8, 0.5))
    whole, alone = (
        objective.denoiser(p)(jnp.asarray(batch["x"]), level, Conditioning())
        for p in (params, objective.network_params(params))
    )
    np.testing.assert_array_equal(whole, alone)


@pytest.mark.parametrize("stratify", [None, 32])
def test_levels_are_those_that_the_loss_sees(stratify):
    """A loss that is the time itself, told by quartile too."""
    objective = affine_objective(
        stratify=stratify,
        weighting=lambda level, c_out: level.t,
        distance=lambda a, b: jnp.ones(len(a)),
    )
    batch, key = batch_of(32), jax.random.key(4)
    loss, metrics = objective.loss(objective.init(key, batch), Context(), batch, key)
    t = np.asarray(objective.levels(key, jnp.arange(32)).t)
    assert float(loss) == pytest.approx(t.mean(), rel=1e-5)
    total, weight = metrics["loss_q"]
    for k in range(4):
        inside = t[(t > k / 4) & (t <= (k + 1) / 4)]
        assert float(total[k] / weight[k]) == pytest.approx(inside.mean(), rel=1e-5)


def test_denoiser_uses_the_conventions_of_time():
    level = schedules.linear()(jnp.array([1 / 1000, 0.5, 1.0]))
    np.testing.assert_allclose(ddpm_index(level), [0, 499, 999], atol=1e-3)
    np.testing.assert_allclose(thousand_t(level), [1, 500, 1000], rtol=1e-6)
    np.testing.assert_allclose(log_sigma(level), jnp.log(level.sigma / level.alpha) / 4, rtol=1e-6)


def test_denoiser_splits_learned_variances():
    objective = affine_objective(network=Affine(4))
    params = objective.init(jax.random.key(0), batch_of(3))
    denoise = objective.denoiser(params)
    level = objective.schedule(jnp.full(3, 0.5))
    x0_hat, nu, _ = denoise(jnp.ones((3, 2)), level, Conditioning())
    assert x0_hat.shape == nu.shape == (3, 2)
    assert nu.min() >= 0 and nu.max() <= 1


def noises(count, **options):
    """Noise in x_t and noise in the target, [count, 2, 3, 2] each, of examples that are zero."""
    found = {}

    class Copy(nn.Module):
        @nn.compact
        def __call__(self, x, time, cond, train=False):
            self.param("unused", nn.initializers.zeros, (1,))
            return x

    def note(output, target):
        found.update(seen=output, target=target)
        return output.mean((1, 2, 3))

    objective = affine_objective(
        network=Copy(),
        prediction=predictions.eps,
        times=lambda u, schedule: jnp.full_like(u, 0.5),
        distance=note,
        **options,
    )
    batch = {"x": np.zeros((count, 2, 3, 2), np.float32)}
    objective.loss(objective.init(jax.random.key(0), batch), Context(), batch, jax.random.key(1))
    level = objective.schedule(np.float32(0.5))
    return np.asarray(found["seen"]) / level.sigma, np.asarray(found["target"])


def test_noise_offset_is_shared_by_a_channel_and_part_of_the_target():
    seen, target = noises(60_000, noise=Gaussian(offset=0.5))
    np.testing.assert_allclose(seen, target, atol=1e-5)
    covariance = np.cov(target.reshape(-1, 12).T)
    channel = np.tile([0, 1], 6)
    same = channel[:, None] == channel[None]
    np.testing.assert_allclose(covariance, np.eye(12) + 0.25 * same, atol=0.04)
    # Each example has its own, and the rest is the noise that there is without.
    _, plain = noises(60_000)
    offset = target - plain
    np.testing.assert_allclose(offset, np.broadcast_to(offset[:, :1, :1], offset.shape), atol=1e-6)
    assert abs(np.corrcoef(offset[:-1, 0, 0, 0], offset[1:, 0, 0, 0])[0, 1]) < 0.03


def test_input_perturbation_is_not_part_of_the_target():
    seen, target = noises(20_000, noise=Gaussian(perturbation=0.3))
    np.testing.assert_array_equal(target, noises(20_000)[1])
    more = (seen - target).reshape(20_000, 12)
    both = np.concatenate([more, target.reshape(20_000, 12)], axis=1)
    expected = np.diag(np.repeat([0.09, 1.0], 12))
    np.testing.assert_allclose(np.cov(both.T), expected, atol=0.03)


def test_quartiles_with_learned_uncertainty_are_those_of_the_noise():
    """The term's log-variance u is no random number: each quartile keeps its quarter of the
    examples, and with u = 0.3 everywhere its loss is exp(-0.3) loss + 0.3."""
    objective = affine_objective(terms=(Uncertainty(),), stratify=64)
    batch, key = batch_of(64), jax.random.key(1)
    params = objective.init(jax.random.key(0), batch)
    dense = params["uncertainty"]["Dense_0"]
    assert not np.any(dense["kernel"])
    dense["bias"] = jnp.array([0.3])
    _, found = objective.loss(params, Context(), batch, key)
    _, plain = dataclasses.replace(objective, terms=()).loss(params, Context(), batch, key)
    total, weight = found["loss_q"]
    np.testing.assert_allclose(weight, 0.25)
    right = np.exp(-0.3) * np.asarray(plain["loss_q"].total) + 0.3 / 4
    np.testing.assert_allclose(total, right, rtol=1e-5)
