import re

import jax
import numpy as np
import pytest

from configs import base
from diffusion import ema
from diffusion.config import averages, initialization
from diffusion.runs import posthoc, snapshots
from diffusion.runs.checkpoints import Checkpoints
from diffusion.runs.restore import restore_ema
from diffusion.training.state import TrainState

OTHER = {
    "network": {"conv_in": {"kernel": np.full((2, 3), 1.0), "bias": np.full(3, 2.0)}},
    "head": {"kernel": np.full((3, 10), 3.0)},
}


def own(classes=10):
    """This model, as it would begin without another."""
    return {
        "network": {
            "conv_in": {"kernel": np.zeros((2, 3), np.float32), "bias": np.zeros(3, np.float32)},
            "conv_out": {"kernel": np.zeros(4, np.float32)},
        },
        "head": {"kernel": np.zeros((3, classes), np.float32)},
    }


SHAPES = jax.eval_shape(own)


def merge(what="", classes=10, given=OTHER):
    return initialization.merge(own(classes), lambda: own(classes), given, what)


def test_all_that_is_there_is_taken():
    params, report = merge()
    np.testing.assert_array_equal(params["network"]["conv_in"]["kernel"], 1)
    np.testing.assert_array_equal(params["head"]["kernel"], 3)
    np.testing.assert_array_equal(params["network"]["conv_out"]["kernel"], 0)
    assert params["head"]["kernel"].dtype == np.float32
    assert report.missing == ("network/conv_out/kernel",) and not report.unused
    assert "1 not there, so as without it:\n  network/conv_out/kernel" in report.text("it")


def test_a_regular_expression_chooses():
    params, report = merge("conv_in/.*kernel")
    assert report.taken == ("network/conv_in/kernel",) and not report.missing
    assert report.left_out[0] == "head/kernel" and report.unused == (
        "head/kernel",
        "network/conv_in/bias",
    )
    np.testing.assert_array_equal(params["network"]["conv_in"]["bias"], 0)


def test_all_given_needs_nothing_of_its_own():
    def never():
        raise AssertionError

    params, report = initialization.merge(own(), never, own(), "")
    assert len(report.taken) == 4 and set(params) == {"network", "head"}


def test_other_shapes_are_refused_unless_left_out():
    with pytest.raises(ValueError, match=r"head/kernel: \(3, 10\) there, \(3, 7\) here") as error:
        merge(classes=7)
    advice = re.search(r"'(\^.*\))'", str(error.value)).group(1)
    _, report = merge(advice, classes=7)
    assert report.left_out == ("head/kernel",) and len(report.taken) == 2


def test_nothing_taken_is_an_error():
    with pytest.raises(ValueError, match=r"init_what='conv_inn' matches none .*network/conv_in"):
        merge("conv_inn")
    with pytest.raises(ValueError, match=r"none of the 4 parameters.*instead of .*net/conv_in"):
        merge(given={"net": OTHER["network"]})


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Checkpoints of steps 3 and 6, of which the first is the better, and snapshots."""
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(workdir, keep=1, keep_best=1, best="loss")
    write = snapshots.writer(workdir, 3)
    for step in (3, 6):
        tree = jax.tree.map(lambda x, step=step: jax.numpy.full(x.shape, float(step)), own())
        emas = {"ema": tree} | dict.fromkeys(snapshots.profiles(), tree)
        state = TrainState(jax.numpy.int32(step), tree, tree, emas)
        checkpoints.save(state, metrics={"loss": step})
        write(state, step)
    checkpoints.close()
    return workdir


def config(**changes):
    c = base.get_config()
    for name, value in changes.items():
        section, field = name.split("__")
        c[section][field] = value
    return c


def test_a_run_begins_with_anothers(run, tmp_path, capsys):
    calls = []

    def random():
        calls.append(1)
        return jax.tree.map(jax.numpy.asarray, own())

    for source, value in ((run, 6), (run / "checkpoints" / "3", 3)):
        c = config(train__init_from=str(source), train__init_what="network")
        initialization.check(c)
        params = initialization.initial(c, str(tmp_path))(SHAPES, random)
        np.testing.assert_array_equal(params["network"]["conv_out"]["kernel"], value)
        np.testing.assert_array_equal(params["head"]["kernel"], 0)
        text = capsys.readouterr().out
        assert f"3 of 4 parameter arrays of {run}, step {value} (ema); 1 are left out" in text
        assert "head/kernel" in (tmp_path / "init_from.txt").read_text()
    assert initialization.initial(config(), str(tmp_path)) is None


def test_wrong_beginnings(run, tmp_path):
    for changes, message in [
        ({"train__init_from": str(tmp_path)}, "init_from=.*is not the workdir of a run"),
        ({"train__init_what": "a"}, "init_what='a' needs config.train.init_from"),
        ({"train__init_from": str(run), "train__init_what": "("}, "no regular expression"),
    ]:
        with pytest.raises(ValueError, match=message):
            initialization.check(config(**changes))
    c = config(train__init_from=str(run), train__init_average="fast")
    with pytest.raises(ValueError, match=r"config.train.init_from=.*'fast'.*'ema'"):
        initialization.initial(c, str(tmp_path))(SHAPES, own)


def test_which_parameters_are_sampled_from(run):
    for changes, step, text in [
        ({}, 6, "averaged parameters after step 6"),
        ({"sampler__average": "params", "sampler__checkpoint": "3"}, 3, "trained parameters after"),
        ({"sampler__checkpoint": "best"}, 3, "averaged parameters after step 3"),
        ({"sampler__average": "posthoc(sigma_rel=0.07)"}, 6, "sigma_rel=0.07 up to step 6"),
        (
            {"sampler__average": "posthoc_constant(decay=0.5)", "sampler__checkpoint": "best"},
            3,
            "decay=0.5 up to step 3",
        ),
    ]:
        params, found, said = averages.parameters(config(**changes), str(run))
        assert found == step and text in said
        if "posthoc" not in str(changes):
            np.testing.assert_array_equal(params["head"]["kernel"], step)
    expected, how = posthoc.reconstruct(run, 0.07)
    params, _, said = averages.parameters(
        config(sampler__average="posthoc(sigma_rel=0.07)"), str(run)
    )
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert f"relative residual is {how.residual:.1e}" in said
    assert restore_ema(run, "posthoc_0.05", step="best")[1] == 3
    assert posthoc.reconstruct(run, ema.constant(0.5), 3)[1].snapshots > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler__average": "em"}, "config.sampler.average.*'em'.*ema"),
        ({"sampler__average": "posthoc"}, "config.sampler.average.*needs sigma_rel"),
        ({"sampler__average": "posthoc(sigma_rel=2.0)"}, "average=.*sigma_rel must lie in"),
        ({"sampler__checkpoint": "latest"}, "checkpoint must be newest, best or a step.*'latest'"),
        ({"sampler__checkpoint": "7"}, r"no checkpoint of step 7.*\[3, 6\]"),
        (
            {"sampler__average": "posthoc(sigma_rel=0.1)", "sampler__checkpoint": "9"},
            "last snapshot in .* is of step 6, before 9",
        ),
    ],
)
def test_parameters_that_are_not_there(run, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        averages.parameters(config(**changes), str(run))
