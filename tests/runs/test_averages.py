"""Which of a run's parameters are drawn from: averages, steps, and what is not there."""

import jax
import numpy as np
import pytest
import two_checkpoints

from diffusion import ema
from diffusion.runs import averages, posthoc
from diffusion.runs.restore import restore_ema


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return two_checkpoints.write(tmp_path_factory.mktemp("run"))


def test_which_parameters_are_sampled_from(run):
    for changes, step, text in [
        ({}, 6, "averaged parameters after step 6"),
        ({"average": "params", "checkpoint": "3"}, 3, "trained parameters after"),
        ({"checkpoint": "best"}, 3, "averaged parameters after step 3"),
        ({"average": "posthoc(sigma_rel=0.07)"}, 6, "sigma_rel=0.07 up to step 6"),
        (
            {"average": "posthoc_constant(decay=0.5)", "checkpoint": "best"},
            3,
            "decay=0.5 up to step 3",
        ),
    ]:
        params, found, called = averages.parameters(run, **changes)
        assert found == step and text in called
        if "posthoc" not in str(changes):
            np.testing.assert_array_equal(params["head"]["kernel"], step)
    expected, how = posthoc.reconstruct(run, 0.07)
    params, _, called = averages.parameters(run, "posthoc(sigma_rel=0.07)")
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    assert f"relative residual is {how.residual:.1e}" in called
    assert restore_ema(run, "posthoc_0.05", step="best")[1] == 3
    assert posthoc.reconstruct(run, ema.constant(0.5), 3)[1].snapshots > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average": "em"}, "average: unknown 'em'.*mean 'ema'"),
        ({"average": "posthoc"}, "average=.*needs sigma_rel"),
        ({"average": "posthoc(sigma_rel=2.0)"}, "average: sigma_rel must lie in"),
        ({"checkpoint": "latest"}, "checkpoint must be newest, best or a step.*'latest'"),
        ({"checkpoint": "7"}, r"no checkpoint of step 7.*\[3, 6\]"),
        (
            {"average": "posthoc(sigma_rel=0.1)", "checkpoint": "9"},
            "last snapshot in .* is of step 6, before 9",
        ),
    ],
)
def test_parameters_that_are_not_there(run, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        averages.parameters(run, **changes)
