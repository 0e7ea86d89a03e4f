import os
import re
import signal
from functools import partial

import jax
import numpy as np
import pytest
from linear_run import assert_identical, batches, lines, run

from diffusion.runs.restore import restore_ema
from diffusion.runs.workdir import steps
from diffusion.training import loop


@pytest.fixture(scope="module", autouse=True)
def one_compilation():
    """Runs that differ in nothing that is compiled share their step."""
    make, made = loop.make_train_step, {}

    def cached(*args, devices, **settings):
        key = (tuple(devices), tuple(settings.items()))
        if key not in made:
            made[key] = make(*args, devices=devices, **settings)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", cached)
        yield


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Ten steps without a stop: the state and the log."""
    workdir = tmp_path_factory.mktemp("straight")
    return run(workdir, 10), lines(workdir)


def test_training_lowers_the_loss(tmp_path):
    run(tmp_path, 400, log_every=50, checkpoint_every=400)
    losses = [row["loss"] for row in lines(tmp_path)]
    assert losses[-1] < 0.2 * losses[0]


def test_stopped_and_resumed_is_the_same_to_the_bit(tmp_path, straight):
    def stop(state, step):
        if step == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, 10, hooks=[(1, stop)], checkpoint_every=100)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert steps(tmp_path)[-1] == 5
    state = run(tmp_path, 10)
    assert_identical(state, straight[0])
    assert lines(tmp_path) == straight[1]  # though 5 lies within one of the log's intervals


def test_a_longer_run_goes_on(tmp_path, straight):
    run(tmp_path, 5)
    assert_identical(run(tmp_path, 10), straight[0])


def test_resumed_on_more_devices(tmp_path, straight):
    run(tmp_path, 5)
    state = run(tmp_path, 10, devices=jax.devices())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), state, straight[0]
    )


def test_interrupt_saves(tmp_path):
    def interrupt(state, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 10, hooks=[(1, interrupt)])
    assert signal.getsignal(signal.SIGINT) is before
    assert steps(tmp_path)[-1] == 2


def test_already_done(tmp_path, capsys):
    first = run(tmp_path, 3)
    log = (tmp_path / "metrics.jsonl").read_text()
    hook = []
    again = run(tmp_path, 3, hooks=[(1, lambda *_: hook.append(1))])
    assert_identical(first, again)
    assert "already done, 3 of 3 steps" in capsys.readouterr().out
    assert not hook
    assert (tmp_path / "metrics.jsonl").read_text() == log


@pytest.mark.parametrize("poison", [7, 9])  # 9: the last step, whose checkpoint must not be saved
def test_not_finite_stops_and_keeps_the_checkpoint(tmp_path, poison):
    with pytest.raises(loop.NonFiniteError, match=f"step {poison + 1} .*last good checkpoint: 5"):
        run(tmp_path, 10, batches=partial(batches, poison=[poison]), max_skipped=0)
    assert steps(tmp_path)[-1] == 5
    assert all(np.isfinite(row.get("loss", 0)) for row in lines(tmp_path))
    assert int(run(tmp_path, 10).step) == 10  # with whole data it goes on from there


def test_not_finite_before_the_first_checkpoint(tmp_path):
    with pytest.raises(loop.NonFiniteError, match=r"step 1 .*no checkpoint yet"):
        run(tmp_path, 10, batches=partial(batches, poison=[0]), max_skipped=0)


def test_steps_that_are_not_finite_are_skipped(tmp_path, straight, capsys):
    data = partial(batches, poison=[4, 5, 7])
    state = run(tmp_path / "a", 10, batches=data, max_skipped=2)
    said = capsys.readouterr().out
    assert re.search(r"step 5 was not finite \(loss nan.*skipped, 1 in a row", said)
    assert re.search(r"step 6 .* 2 in a row.*\n.*step 8 .* 1 in a row", said)
    log = lines(tmp_path / "a")
    assert [row.get("skipped_steps") for row in log] == [None, 2, 1, None]
    assert all(np.isfinite(row["loss"]) for row in log)
    assert log[0] == straight[1][0]
    # Stopped within the row, it goes on with it: same state, same log, same count.
    run(tmp_path / "b", 5, batches=data, max_skipped=2)
    assert_identical(run(tmp_path / "b", 10, batches=data, max_skipped=2), state)
    assert lines(tmp_path / "b")[-3:] == log[-3:]
    run(tmp_path / "c", 5, batches=data, max_skipped=1)
    with pytest.raises(loop.NonFiniteError, match=r"step 6 .*2 in a row .*checkpoint: 5"):
        run(tmp_path / "c", 10, batches=data, max_skipped=1)


def test_validation_is_logged_on_time_and_once(tmp_path):
    def validate(state, step):
        assert int(state.step) == step
        return {"validation_loss": 1 / step}

    def logged(workdir):
        found = [(row["step"], row.get("validation_loss")) for row in lines(workdir)]
        return [row for row in found if row[1]]

    run(tmp_path / "a", 10, validate=(4, validate))
    assert logged(tmp_path / "a") == [(4, 0.25), (8, 0.125), (10, 0.1)]
    run(tmp_path / "b", 5, validate=(4, validate))
    run(tmp_path / "b", 10, validate=(4, validate))
    assert logged(tmp_path / "b") == [(4, 0.25), (5, 0.2), (8, 0.125), (10, 0.1)]


def test_hooks_run_on_time_and_at_the_end(tmp_path):
    calls = []

    def record(name, state, step):
        assert int(state.step) == step
        calls.append((name, step))

    run(tmp_path, 7, hooks=[(3, partial(record, "a")), (0, partial(record, "end"))])
    assert calls == [("a", 3), ("a", 6), ("a", 7), ("end", 7)]


def test_a_failing_hook_costs_no_training(tmp_path):
    def fail(state, step):
        raise RuntimeError("no space for pictures")

    with pytest.raises(RuntimeError, match="pictures"):
        run(tmp_path, 10, hooks=[(4, fail)])
    assert steps(tmp_path)[-1] == 4


def test_log_holds_means_over_the_interval(tmp_path, straight):
    run(tmp_path, 10, log_every=1)
    each = {row["step"]: row for row in lines(tmp_path)}
    for row, of in zip(straight[1], ([1, 2, 3], [4, 5, 6], [7, 8, 9], [10])):
        assert row["step"] == of[-1]
        assert row["loss"] == pytest.approx(np.mean([each[s]["loss"] for s in of]), rel=1e-6)


def test_averages_alone_can_be_read(tmp_path):
    state = run(tmp_path, 6, keep=2)
    for name in ("constant", "power"):
        average, step = restore_ema(tmp_path, name)
        assert step == 6
        assert_identical(average, state.ema[name])
    assert_identical(restore_ema(tmp_path, "params")[0], state.params)


def test_given_parameters_are_begun_with(tmp_path, straight):
    given = {"w": np.full((3, 2), 0.5, np.float32), "b": np.ones(2, np.float32)}
    state = run(tmp_path / "a", 1, initial_params=lambda shapes, random: given)
    # One warm-up step of a third of the rate is all that has happened to them and to the average.
    for tree in (state.params, state.ema["power"]):
        jax.tree.map(lambda p, g: np.testing.assert_allclose(p, g, atol=0.011), tree, given)
    assert_identical(given, {"w": np.full((3, 2), 0.5), "b": np.ones(2)})

    def must_not_be_called(shapes, random):
        raise AssertionError

    assert int(run(tmp_path / "a", 2, initial_params=must_not_be_called).step) == 2
    with pytest.raises(ValueError, match=r"\['w'\] should have shape \(3, 2\), got \(2, 2\)"):
        run(
            tmp_path / "b",
            1,
            initial_params=lambda shapes, random: {"w": np.ones((2, 2)), "b": np.ones(2)},
        )


def test_given_parameters_may_be_random_in_part(tmp_path):
    def half(shapes, random):
        assert shapes["w"].shape == (3, 2)
        return {"w": random()["w"], "b": np.ones(2, np.float32)}

    given, plain = (
        run(tmp_path / name, 1, initial_params=initial)
        for name, initial in (("half", half), ("plain", None))
    )
    np.testing.assert_allclose(given.params["w"], plain.params["w"], atol=0.011)
    np.testing.assert_allclose(given.params["b"] - plain.params["b"], 1, atol=0.02)


def test_data_that_end(tmp_path):
    with pytest.raises(ValueError, match="ended after step 4"):
        run(tmp_path, 10, batches=partial(batches, end=4))


def test_wrong_settings(tmp_path):
    with pytest.raises(ValueError, match=r"log_every.*0"):
        run(tmp_path, 10, log_every=0)
    with pytest.raises(ValueError, match="3 pieces"):
        run(tmp_path, 10, devices=jax.devices()[:3])
