"""config.train.init_from: which parameters another run gives, and which it cannot."""

import re

import jax
import numpy as np
import pytest
import two_checkpoints
from two_checkpoints import initial

from configs import base
from diffusion.config import initialization

OTHER = {
    "network": {"conv_in": {"kernel": np.full((2, 3), 1.0), "bias": np.full(3, 2.0)}},
    "head": {"kernel": np.full((3, 10), 3.0)},
}


SHAPES = jax.eval_shape(initial)


def merge(what="", classes=10, given=OTHER):
    return initialization.merge(initial(classes), lambda: initial(classes), given, what)


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


def test_all_given_needs_nothing_of_its_initial():
    def never():
        raise AssertionError

    params, report = initialization.merge(initial(), never, initial(), "")
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
    return two_checkpoints.write(tmp_path_factory.mktemp("run"))


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
        return jax.tree.map(jax.numpy.asarray, initial())

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
        initialization.initial(c, str(tmp_path))(SHAPES, initial)
