import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear_run import EMAS, Linear, assert_identical, batch_of

from diffusion.runs import workdir as workdirs
from diffusion.runs.checkpoints import Checkpoints
from diffusion.runs.restore import restore_ema
from diffusion.runs.workdir import differences, record_start, save_config
from diffusion.training import optimizers, parallel
from diffusion.training.state import create
from diffusion.training.step import make_train_step

ADAM = optimizers.make("adam", 0.01)
KEY = jax.random.key(1)


def initial(devices=1):
    state = create(Linear(), ADAM, EMAS, jax.random.key(0), batch_of(0))
    return parallel.place(parallel.make(devices=jax.devices()[:devices]), state)


def template(devices):
    return parallel.template(parallel.make(devices=jax.devices()[:devices]), initial())


def test_donation_right_after_a_save_does_not_reach_the_file(tmp_path):
    state = initial()
    expected = jax.tree.map(np.array, state)
    step = make_train_step(Linear(), ADAM, EMAS, devices=jax.devices()[:1])
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(state)
    for i in range(3):
        state, _ = step(state, None, batch_of(i), KEY)
    checkpoints.close()
    assert_identical(Checkpoints(tmp_path).restore(template(1))[0], expected)


@pytest.mark.parametrize("devices", [1, 4])
def test_restored_states_are_ready_for_the_step(tmp_path, devices):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(initial(), {"note": [1.5, "a"]})
    checkpoints.close()
    restored, extra = Checkpoints(tmp_path).restore(template(devices))
    assert extra == {"note": [1.5, "a"]}
    step = make_train_step(Linear(), ADAM, EMAS, devices=jax.devices()[:devices])
    new, _ = step(restored, None, batch_of(0), KEY)
    direct, _ = step(initial(devices), None, batch_of(0), KEY)
    assert_identical(new, direct)
    assert all(x.is_deleted() for x in jax.tree.leaves(restored))


def test_the_newest_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 3):
        checkpoints.save(initial().replace(step=jnp.int32(step)))
    checkpoints.save(initial().replace(step=jnp.int32(3)))  # once more: no error
    checkpoints.close()
    assert sorted(p.name for p in (tmp_path / "checkpoints").glob("[0-9]*")) == ["2", "3"]
    assert restore_ema(tmp_path, "power", step=2)[1] == 2
    with pytest.raises(FileNotFoundError, match=r"step 1 .*\[2, 3\]"):
        restore_ema(tmp_path, "power", step=1)
    with pytest.raises(ValueError, match=r"'fast'.*'constant', 'power', 'params'"):
        restore_ema(tmp_path, "fast")
    with pytest.raises(ValueError, match="keep"):
        Checkpoints(tmp_path, keep=0)


def test_no_checkpoint(tmp_path):
    with pytest.raises(FileNotFoundError, match="none"):
        restore_ema(tmp_path / "nowhere", "constant")
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.latest() is None
    with pytest.raises(FileNotFoundError):
        checkpoints.restore(template(1))


CONFIG = {"steps": 10, "model": {"name": "unet", "width": 8}, "schedule": {"steps": 1000}}


def test_how_the_config_of_another_run_differs(tmp_path):
    other = CONFIG | {"model": {"name": "dit", "width": 8}}
    assert not differences(tmp_path, other)  # there is no run yet
    save_config(tmp_path, CONFIG)
    assert json.loads((tmp_path / "config.json").read_text()) == CONFIG
    assert not differences(tmp_path, other)  # nothing was trained yet
    checkpoints = Checkpoints(tmp_path, about={"config": CONFIG})
    checkpoints.save(initial())
    checkpoints.close()
    less = {k: v for k, v in CONFIG.items() if k != "schedule"}
    for _ in range(2):
        assert not differences(tmp_path, CONFIG)
        assert differences(tmp_path, other) == ["  model.name: 'unet' there, 'dit' here"]
        assert differences(tmp_path, less) == ["  schedule.steps: 1000 there, (absent) here"]
        assert workdirs.read_config(tmp_path) == CONFIG
        (tmp_path / "config.json").unlink(missing_ok=True)  # each checkpoint holds it


def test_some_settings_may_change(tmp_path):
    save_config(tmp_path, CONFIG)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(initial())
    checkpoints.close()
    other = CONFIG | {"steps": 20, "model": {"name": "unet", "width": 9}}
    assert not differences(tmp_path, other, changeable=("steps", "model.w*"))
    assert "width" in differences(tmp_path, other, changeable=("steps",))[0]


def test_each_start_is_recorded(tmp_path):
    record_start(tmp_path, 0, {"config": CONFIG})
    record_start(tmp_path, 5, {"config": CONFIG | {"steps": 11}})
    starts = [json.loads(row) for row in (tmp_path / "starts.jsonl").read_text().splitlines()]
    assert [row["config"]["steps"] for row in starts] == [10, 11]
    assert [row["after_step"] for row in starts] == [0, 5]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax's
def test_another_model_is_refused(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(initial().replace(step=jnp.int32(1)))
    checkpoints.finish()
    like = template(1)
    bigger = {"w": jax.ShapeDtypeStruct((4, 2), jnp.float32, sharding=like.step.sharding)}
    with pytest.raises(
        ValueError, match=r"checkpoints/1 is of another model .*\n  w: \(3, 2\) there, \(4, 2\)"
    ):
        checkpoints.restore(like.replace(params=like.params | bigger))
    with pytest.raises(ValueError, match="has no ema_slow, which this configuration trains"):
        checkpoints.restore(like.replace(ema={"slow": like.params}))
    checkpoints.close()
