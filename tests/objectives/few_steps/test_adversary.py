"""Students with a critic: its heads and losses, what it looks at, and the teacher's solver."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from exact import FLOW, denoise, exact_loss, levels, taught
from test_matching import FROZEN, KEY, LEARNED, SETTINGS, TAUGHT, points

from diffusion import schedules
from diffusion.conditioning import Conditioning
from diffusion.levels import NoiseLevel
from diffusion.models.dinov2 import DinoV2
from diffusion.objectives.few_steps import jumps
from diffusion.objectives.few_steps.adversary import Adversarial, latent_adversarial
from diffusion.objectives.few_steps.critics import GAMES, Heads, Inner, slope_penalty, teacher
from diffusion.objectives.few_steps.flash import Flash
from diffusion.objectives.few_steps.student import Student
from diffusion.objectives.objective import Context
from diffusion.sampling import solvers
from diffusion.sampling.sample import image_keys, sample


def test_the_teachers_solver_is_dpm_solver_from_any_node():
    count, first = 8, np.array([0, 0, 3, 3, 7])
    with jax.enable_x64(True):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 2)))
        t = np.linspace(1, 0, count + 1)
        nodes = FLOW(jnp.broadcast_to(jnp.asarray(t)[:, None], (count + 1, 5)))
        found = jumps.multistep(denoise, x, nodes, jnp.asarray(first))
        for k in (0, 3, 7):
            solver = solvers.dpmpp_2m(levels(t[k:]))
            mine = first == k
            keys = image_keys(0, np.arange(mine.sum()))
            expected = sample(denoise, solver, keys, (2,), x_init=x[mine])
            np.testing.assert_allclose(found[mine], expected, atol=1e-6)


def test_the_exact_function_has_the_error_of_the_teachers_solver_alone():
    """The squared distance falls as K^-2 of a solver of order 1, as K^-4 of order 2; here the last
    step is of order 1."""
    coarse, fine = (
        exact_loss(taught(Flash(1, solver_steps=k, matching=(), adversary=())))[0] for k in (32, 64)
    )
    assert 2.7 < np.log2(coarse / fine) < 4.3
    assert fine < 1e-6


def test_where_flash_begins():
    method = Flash(stage=10, solver_steps=32)
    u = (jnp.arange(4000) + 0.5) / 4000
    for stage, expected in enumerate([(0, 0, 0.5, 0.5), (0.1, 0.3, 0.3, 0.3)]):
        near = np.round(np.asarray(method._start(u, stage)) / 8).astype(int)
        shares = np.bincount(near, minlength=5)[:4] / 4000
        # At the first mode half of the bell lies before the solver's first step.
        weights = np.array(expected) * [0.62, 1, 1, 1]
        np.testing.assert_allclose(shares, weights / weights.sum(), atol=0.03)


def test_losses_of_the_game():
    real, fake = (jnp.array([[2.0, 0.5]]), jnp.array([[0.0]])), (jnp.array([[-3.0, 0.5]]),) * 2
    hinge = GAMES["hinge"]
    assert float(hinge.critic(real, fake)) == pytest.approx((0.25 + 1) / 2 + 0.75)
    assert float(hinge.student(fake)) == pytest.approx(1.25)
    squares = GAMES["squares"]
    assert float(squares.critic(real, fake)) == pytest.approx(
        ((1 + 0.25) / 4 + 0.5 + (9 + 0.25) / 2) / 2
    )
    zero = (jnp.zeros((2, 1)),)
    assert float(GAMES["softplus"].critic(zero, zero)) == pytest.approx(2 * np.log(2))
    assert float(GAMES["softplus"].student(zero)) == pytest.approx(np.log(2))


def test_the_penalty_is_the_square_of_the_slope():
    w, layers = jnp.array([1.0, 2.0]), (jnp.ones((3, 5, 2)), jnp.ones((3, 2)))
    judged = slope_penalty(lambda layers: tuple(layer @ w for layer in layers), layers)
    assert float(judged) == pytest.approx(5 * (1 + 4) + (1 + 4))


def test_a_head_projects_on_what_it_is_given():
    tokens = jax.random.normal(KEY, (2, 18))
    layers, given = (tokens[:, :12].reshape(2, 3, 4), tokens[:, 12:]), jnp.eye(2)
    heads = Heads(8)
    params = heads.init(KEY, layers, given)
    plain = [logits.shape for logits in heads.apply(params, layers, given)]
    assert plain == [(2, 3), (2, 1)]
    twice = heads.apply(params, layers, given), heads.apply(params, layers, given[::-1])
    assert jnp.abs(twice[0][0] - twice[1][0]).max() > 1e-4


def test_where_the_student_begins():
    method = latent_adversarial(switch=100)
    objective = Student(*SETTINGS, method=method)
    u = (jnp.arange(1000) + 0.5) / 1000
    for step, shares in ((0, (0, 0, 0.5, 0.5)), (100, (0.7, 0.1, 0.1, 0.1))):
        level, blank = method._start(objective, u, step)
        for t, share in zip((1, 0.75, 0.5, 0.25), shares):
            assert float((level.t == t).mean()) == pytest.approx(share, abs=2e-3)
        assert float(blank.mean()) == pytest.approx(shares[0], abs=2e-3)
    cosine = Student(SETTINGS[0], schedules.VPSDE(), *SETTINGS[2:], method=method)
    level, blank = method._start(cosine, u, 100)
    assert cosine.schedule(1.0).alpha > 0 and (level.alpha[blank] == 0).all()


def critic(method, blocks=(1, 2)):
    network, _, prediction, c_noise = SETTINGS
    return Student(
        *SETTINGS,
        method=method,
        teacher=TAUGHT.denoiser,
        extract=Inner(network, prediction, c_noise, None, blocks),
        frozen=jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), FROZEN),
    )


@pytest.mark.parametrize(
    "method",
    [Adversarial(teacher(), r1=0.0), latent_adversarial(switch=1), Flash(1, solver_steps=4)],
)
def test_each_player_holds_the_other_fixed(method):
    """The parts of the loss that a player minimises change it alone."""
    objective = critic(method)
    params = jax.jit(objective.init)(KEY, points(0)) | LEARNED
    context = Context(FROZEN, step=3)

    @jax.jit
    def slopes(params):
        def loss(params):
            return objective.loss(params, context, points(1), KEY)

        return jax.grad(loss, has_aux=True)(params)

    grads, metrics = slopes(params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    silent = jax.tree.map(jnp.zeros_like, params["head"])
    alone, _ = slopes({**params, "head": silent})
    # Heads that are zero give the student no slope; the rest of its loss stays the same.
    changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), grads["network"], alone["network"])
    assert max(jax.tree.leaves(changed)) > 1e-6
    if method.features.kind == "teacher" and method.noised:
        assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(alone["network"])) == 0
    assert max(np.abs(leaf).max() for leaf in jax.tree.leaves(grads["head"])) > 1e-6
    assert {"critic", "adversary"} & set(metrics)


class Linear(nn.Module):
    """A network whose two blocks give what they are given, in its own scale."""

    @nn.compact
    def __call__(self, x, time, cond, train=False, features=()):
        return x, tuple(i * x + time[:, None] for i in features)


def test_features_are_seen_on_the_networks_own_schedule():
    edm = schedules.EDM()
    inner = Inner(Linear(), SETTINGS[2], lambda level: level.sigma, edm, (1, 3))
    x, level = jnp.ones((2, 2)), NoiseLevel(*(jnp.full(2, v) for v in (0.5, 0.5, 0.5)))
    first, third = inner({"network": {}}, x, level, Conditioning())
    np.testing.assert_allclose(first, 2 * x + 1, rtol=1e-5)  # sigma / alpha = 1, x / alpha = 2
    np.testing.assert_allclose(third, 6 * x + 1, rtol=1e-5)


def test_layers_of_dinov2():
    net = DinoV2(width=8, depth=3, heads=2, size=28, patch=14, mask_token=False)
    images = jax.random.normal(KEY, (2, 28, 28, 3))
    params = net.init(KEY, images)
    last, (first, third) = net.apply(params, images, (1, 3))
    np.testing.assert_array_equal(last, net.apply(params, images))
    norm = nn.LayerNorm(epsilon=1e-6)
    np.testing.assert_allclose(
        norm.apply({"params": params["params"]["layernorm"]}, third), last, atol=1e-5
    )
    assert first.shape == third.shape == (2, 5, 8) and np.abs(first - third).max() > 0
    with pytest.raises(ValueError, match=r"features=.4,. must be layers 1..3"):
        net.apply(params, images, (4,))


def test_impossible_settings():
    with pytest.raises(ValueError, match="expected 4 numbers"):
        Adversarial(probabilities=(0.5, 0.5))
    with pytest.raises(ValueError, match="expected both, or neither"):
        Adversarial(switch=5)
    with pytest.raises(ValueError, match="multiple of 4; nearest: 28 or 32"):
        Flash(solver_steps=30)
    with pytest.raises(ValueError, match="each of 4 stages"):
        Flash(adversary=(0.1,))
