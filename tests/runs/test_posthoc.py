import jax.numpy as jnp
import numpy as np
import pytest
from linear_run import assert_identical, run

from diffusion import ema
from diffusion.runs import posthoc, snapshots
from diffusion.training.state import TrainState

STEPS = 2000
KEPT = (0.05, 0.10)


@pytest.fixture(scope="module")
def walk():
    """[STEPS, 50]: parameters of size 3 that wander by about 1."""
    rng = np.random.default_rng(0)
    steps = rng.normal(size=(STEPS, 50)).cumsum(axis=0) / np.sqrt(STEPS)
    return steps + 3 * rng.normal(size=50)


def averaged(walk, sigma_rel, step):
    """Step by step, as training does it, in float64."""
    exponent = ema.gamma_from_sigma_rel(sigma_rel) + 1
    average = np.zeros(walk.shape[1])
    for t, params in enumerate(walk[:step], 1):
        beta = (1 - 1 / t) ** exponent
        average = beta * average + (1 - beta) * params
    return average


def size(x):
    return np.sqrt(np.mean(x**2))


def test_inner_products_are_integrals():
    t = np.linspace(0, 1, 200_001)[1:] - 2.5e-6
    a = 7 * t**6
    b = np.where(t < 0.6, 13 / 0.6 * (t / 0.6) ** 12, 0)
    for (ga, ta, pa), (gb, tb, pb) in [
        ((6, 1, a), (12, 0.6, b)),
        ((12, 0.6, b), (6, 1, a)),
        ((6, 1, a), (6, 1, a)),
    ]:
        assert posthoc.inner(ga, ta, gb, tb) == pytest.approx(np.mean(pa * pb), rel=1e-4)


@pytest.mark.parametrize("profile", [ema.power_function(0.1), ema.constant(0.9)])
def test_weights_are_those_of_the_updates(walk, profile):
    average = jnp.zeros(50)
    for t, params in enumerate(walk[:200], 1):
        average = ema.update(average, jnp.asarray(params, jnp.float32), profile(t))
    weights = posthoc.weights(profile, 200)
    np.testing.assert_allclose(weights @ walk[:200], average, atol=1e-5)
    assert weights.sum() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("count", "error"), [(4, 1e-2), (8, 3e-3), (16, 6e-4), (32, 1e-4)])
def test_reconstructed_from_snapshots_of_a_random_walk(walk, count, error):
    kept = [(s, STEPS * (i + 1) // count) for s in KEPT for i in range(count)]
    averages = np.stack([averaged(walk, *pair) for pair in kept])
    errors, residuals = [], []
    for wanted in (0.07, 0.12, 0.15, 0.20):
        mixture = posthoc.mix(kept, wanted, STEPS)
        true = averaged(walk, wanted, STEPS)
        errors.append(size(mixture.coefficients @ averages - true) / size(true))
        residuals.append(mixture.residual)
        assert mixture.coefficients.sum() == pytest.approx(1)
    assert error / 30 < max(errors) < error
    assert max(residuals) < 3e-1 and residuals[1] < residuals[3]


def test_at_any_step_and_of_any_profile(walk):
    kept = [(s, i) for s in KEPT for i in range(50, STEPS + 1, 50)]
    averages = np.stack([averaged(walk, *pair) for pair in kept])
    step = 1430  # between two snapshots
    mixture = posthoc.mix(kept, 0.12, step)
    true = averaged(walk, 0.12, step)
    assert size(mixture.coefficients @ averages - true) < 5e-4 * size(true)
    assert mixture.residual > 0.1  # its profile ends where none of theirs does
    mixture = posthoc.mix(kept, ema.constant(0.99), STEPS)
    true = posthoc.weights(ema.constant(0.99), STEPS) @ walk
    assert size(mixture.coefficients @ averages - true) < 2e-3 * size(true)
    assert mixture.residual < 0.2


def test_a_kept_average_is_exact():
    kept = [(s, i) for s in KEPT for i in range(100, 1001, 100)]
    for i in (3, 19):
        mixture = posthoc.mix(kept, *kept[i])
        np.testing.assert_allclose(mixture.coefficients, np.eye(20)[i], atol=1e-9)
        assert mixture.residual < 1e-6
    same = posthoc.mix([(0.1, 5), (0.1, 5)], 0.1, 5)  # the system is singular
    np.testing.assert_allclose(same.coefficients, [0.5, 0.5], atol=1e-9)


def test_wrong_questions():
    with pytest.raises(ValueError, match="no snapshots"):
        posthoc.mix([], 0.1, 5)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        posthoc.mix([(0.1, 5)], 0.1, 0)
    with pytest.raises(ValueError, match=r"\(0, 0.289\], got 0.5"):
        posthoc.mix([(0.1, 5)], 0.5, 5)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that saved snapshots, and also kept the average that is wanted."""
    workdir = tmp_path_factory.mktemp("trained")
    hooks = [(4, snapshots.writer(workdir, 4))]
    state = run(
        workdir, 40, emas=snapshots.profiles() | {"wanted": ema.power_function(0.15)}, hooks=hooks
    )
    return workdir, state


def test_reconstructed_from_files(trained):
    workdir, state = trained
    assert [s.step for s in snapshots.listed(workdir)[::2]] == list(range(4, 41, 4))
    for wanted, name, tolerance in ((0.15, "wanted", 2e-3), (0.05, "posthoc_0.05", 1e-3)):
        params, how = posthoc.reconstruct(workdir, wanted)
        assert how.step == 40 and how.residual < 0.03
        for leaf, value in state.ema[name].items():
            np.testing.assert_allclose(params[leaf], value, atol=tolerance)
            assert params[leaf].dtype == jnp.float32
    params, how = posthoc.reconstruct(workdir, 0.10, step=20)
    stored = snapshots.read(
        next(s for s in snapshots.listed(workdir) if s.step == 20 and s.sigma_rel == 0.1)
    )
    assert how.snapshots == 1
    np.testing.assert_allclose(params["w"], stored["w"]().astype(np.float32), rtol=1e-6)
    with pytest.raises(ValueError, match=r"last snapshot in .* is of step 40, before 50"):
        posthoc.reconstruct(workdir, 0.10, step=50)


def test_snapshots_that_are_damaged_or_missing(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no snapshots.*snapshot_every"):
        posthoc.reconstruct(tmp_path, 0.1)
    path = snapshots.listed(trained[0])[-1].path
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{path.name} is damaged: the checksum of"):
            posthoc.reconstruct(trained[0], 0.15)
        path.write_bytes(data[:-1])
        with pytest.raises(ValueError, match=f"{path.name} is truncated"):
            posthoc.reconstruct(trained[0], 0.15)
    finally:
        path.write_bytes(data)


def test_what_a_run_would_not_have_goes(tmp_path):
    averages = {
        name: {"w": jnp.full(3, 7e4), "b": jnp.full(2, 1 / 3)} for name in snapshots.profiles()
    }
    state = TrainState(jnp.int32(0), {}, (), averages)
    for step in (3, 6, 7):  # with other settings; 7 was the last
        snapshots.writer(tmp_path, 3)(state, step)
    write = snapshots.writer(tmp_path, 5)
    (tmp_path / "snapshots" / "x.partial").touch()
    write(state, 10)
    write(state, 12)
    assert sorted({s.step for s in snapshots.listed(tmp_path)}) == [3, 10, 12]
    assert not list((tmp_path / "snapshots").glob("*.partial"))
    stored = snapshots.read(snapshots.listed(tmp_path)[0])
    assert stored["w"]().dtype == np.float32 and stored["b"]().dtype == np.float16  # where it fits
    assert_identical(stored["w"](), np.full(3, 7e4, np.float32))
