"""Every mistake in a config stops before compilation, naming the field and what would be valid."""

import itertools
import re

import jax
import pytest
from diffusion.config.sampler import make_solver

from configs import (
    cifar10_ddpm,
    cifar10_edm,
    cifar10_flow,
    digits,
    imagenet256_dit_xl2,
    mnist,
    toy2d,
)
from diffusion.config import experiment as builder
from diffusion.config.experiment import build
from diffusion.data import sources
from diffusion.sampling import grids, solvers


def with_fields(config, **overrides):
    for name, value in overrides.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


MISTAKES = [
    (dict(data__name="digitz"), r"config\.data\.name='digitz'"),
    (
        dict(model__name="vit"),
        r"config\.model\.name: unknown 'vit'; choose one of dit, mlp, pretrained, unet",
    ),
    (dict(model__name="mlp"), r"config\.model\.name='mlp' does not take images.*unet or dit"),
    (dict(model__dtype="float16"), r"config\.model\.dtype: unknown 'float16'; .*Did you mean"),
    (
        dict(model__name="dit", model__dit__heads=5),
        r"config\.model\.dit: heads=5 must divide width=128.*nearest: 4 or 8",
    ),
    (
        dict(model__name="dit", model__dit__patch=3),
        r"(?s)8.*patch=3.*nearest",
    ),
    (
        dict(model__unet__widths=(16, 16, 16, 16, 16), model__unet__attention=0),
        r"config\.model\.unet: image size 8 is not divisible by 16.*nearest: 16",
    ),
    (dict(model__unet__norm_groups=7), r"config\.model\.unet: .*norm_groups=7"),
    (
        dict(objective__schedule="cosin"),
        r"config\.objective\.schedule: unknown 'cosin'.*Did you mean 'cosine'",
    ),
    (
        dict(objective__schedule="linear(beta_ende=0.1)"),
        r"linear has no option 'beta_ende'; its options: beta_start, beta_end, steps",
    ),
    (
        dict(objective__prediction="epsilon"),
        r"config\.objective\.prediction: unknown 'epsilon'; choose one of edm, eps, flow, v, x0",
    ),
    (dict(objective__times="logitnormal"), r"Did you mean 'logit_normal'"),
    (dict(objective__weighting="min_snr(gamma='a')"), r"wrong type; expected float"),
    (
        dict(objective__prediction="eps", objective__schedule="rectified_flow"),
        r"config\.objective\.prediction='eps' says nothing about x_0 at alpha = 0.*choose x0, v",
    ),
    (
        dict(objective__prediction="eps", objective__schedule="zero_terminal_snr(scaled_linear)"),
        r"config\.objective\.prediction='eps' says nothing",
    ),
    (
        dict(objective__schedule="rectified_flow", objective__c_noise="log_sigma"),
        r"config\.objective\.c_noise='log_sigma' is infinite",
    ),
    (
        dict(objective__terms="variational_bound()"),
        r"config\.objective\.terms='variational_bound\(\)': it bounds a chain of discrete steps",
    ),
    (
        dict(objective__name="consistency", objective__weighting="snr"),
        r"config\.objective\.weighting='snr' has no part in .*'consistency'; leave it at 'simple'",
    ),
    (
        dict(objective__name="consistency", objective__prediction="x0"),
        r"config\.objective\.prediction='x0' does not give x back.*choose v, flow, edm or eps",
    ),
    (
        dict(objective__name="consistency", consistency__solver="rk4"),
        r"config\.consistency\.solver: unknown 'rk4'; choose one of euler, heun",
    ),
    (
        dict(objective__name="consistency", consistency__teacher="nowhere"),
        r"config\.consistency\.teacher='nowhere' is not the workdir of a run",
    ),
    (dict(consistency__teacher="nowhere"), r"teacher='nowhere' teaches .*'consistency', not 'den"),
    (
        dict(objective__name="consistency", consistency__target="emma"),
        r"config\.consistency\.target: unknown 'emma'.*mean 'ema'",
    ),
    (dict(objective__label_dropout=1.5), r"config\.objective\.label_dropout must lie in \[0, 1\]"),
    (
        dict(objective__label_dropout=0.0),
        r"config\.sampler\.guidance=\('cfg\(1\.5\)', 'clip\(\)'\) needs a model",
    ),
    (dict(optimizer__name="adamax"), r"config\.optimizer: unknown optimizer 'adamax'"),
    (dict(optimizer__decay="step"), r"config\.optimizer: unknown decay 'step'"),
    (dict(ema="constant(decay=1.5)"), r"config\.ema: an EMA's decay must lie in \[0, 1\)"),
    (dict(parallel="zero"), r"config\.parallel: unknown parallel='zero'; choose one of pmap, fsdp"),
    (dict(train__batch_size=127), r"config\.train\.batch_size=127 is not divisible by 4.*124 or"),
    (dict(train__steps=0), r"config\.train\.steps must be positive, got 0"),
    (dict(train__keep_best=-1), r"config\.train\.keep_best must be >= 0, got -1"),
    (dict(train__init_from="no/such/run"), r"config\.train\.init_from='no/such/run' is not"),
    (
        dict(train__snapshot_every=5, train__snapshot_sigma_rel=(0.1, 0.1)),
        r"config\.train\.snapshot_sigma_rel: expected one or more different widths",
    ),
    (
        dict(train__snapshot_every=5, train__snapshot_sigma_rel=(0.5,)),
        r"config\.train\.snapshot_sigma_rel: sigma_rel must lie in",
    ),
    (dict(sampler__average="emma"), r"config\.sampler\.average: unknown 'emma'.*mean 'ema'"),
    (dict(sampler__checkpoint="last"), r"config\.sampler\.checkpoint must be newest, best or"),
    (dict(sampler__solver="dpm"), r"config\.sampler\.solver: unknown 'dpm'"),
    (dict(sampler__solver="ddim(eta=2.0)"), r"config\.sampler\.solver='ddim\(eta=2.0\)': eta must"),
    (
        dict(sampler__corrector="langevin", sampler__solver="heun"),
        r"config\.sampler\.corrector='langevin', solver='heun': .*one evaluation per step",
    ),
    (
        dict(
            sampler__corrector="langevin",
            sampler__solver="ddpm",
            sampler__guidance="cfg(2), adaptive_projected",
        ),
        r"config\.sampler\.corrector='langevin' cannot correct with adaptive_projected",
    ),
    (dict(sampler__corrector="langevin(steps=0)"), r"config\.sampler\.corrector=.*steps >= 1"),
    (dict(evaluation__likelihood="odes"), r"config\.evaluation\.likelihood: unknown.*mean 'ode'"),
    (
        dict(evaluation__likelihood="ode(divergence='exat')"),
        r"config\.evaluation\.likelihood=.*unknown 'exat'.*mean 'exact'",
    ),
    (dict(evaluation__likelihood_count=0), r"config\.evaluation\.likelihood_count must be"),
    (
        dict(sampler__grid="leading", sampler__steps=2000),
        r"config\.sampler\.grid='leading', steps=2000: .*more than the 1000",
    ),
    (dict(sampler__steps=0), r"config\.sampler\.steps must be positive, got 0"),
    (
        dict(sampler__grid="uniform(steps=5)"),
        r"config\.sampler\.grid: uniform has no option 'steps'; its options: none",
    ),
    (
        dict(sampler__grid="from_times"),
        r"config\.sampler\.grid='from_times': from_times needs times, as in from_times\(times=",
    ),
    (dict(sampler__grid="from_sigmas(sigma=[9, 0])"), r"no option 'sigma'; its options: sigmas"),
    (
        dict(sampler__grid="from_times(times=[0.5, 0.7, 0])"),
        r"config\.sampler\.grid='from_times.*': times must decrease strictly, got 0\.5 then 0\.7",
    ),
    (
        dict(sampler__grid="from_sigmas(sigmas=[1e9, 1, 0])"),
        r"config\.sampler\.grid='from_sigmas.*lies beyond the schedule's sigma_max = 20291",
    ),
    (
        dict(sampler__grid="karras(sigma_min='a')"),
        r"config\.sampler\.grid=.*an option has a wrong type or size: '<' not supported",
    ),
    (
        dict(sampler__grid="karras(rho=0.001)"),
        r"config\.sampler\.grid='karras\(rho=0.001\)'.*out of range",
    ),
    (
        dict(sampler__solver="midpoint(schedule=3)"),
        r"config\.sampler\.solver: midpoint has no option 'schedule'; its options: none",
    ),
    (
        dict(sampler__solver="dpm_solver(order=3)", sampler__steps=2),
        r"config\.sampler\.solver='dpm_solver\(order=3\)': order=3 needs.*sampler\.steps=2",
    ),
    (
        dict(sampler__solver="edm(s_noise=1e999)"),
        r"config\.sampler\.solver='edm\(s_noise=1e999\)': its coefficients are not finite",
    ),
]


@pytest.mark.parametrize("overrides, message", MISTAKES, ids=lambda value: str(value)[:50])
def test_mistakes_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        build(with_fields(digits.get_config(), **overrides))


@pytest.mark.parametrize(
    "overrides",
    [
        dict(objective__schedule="shifted(rectified_flow, 2.0)", objective__prediction="flow"),
        dict(objective__schedule="edm", objective__prediction="edm", sampler__grid="karras"),
        dict(objective__schedule="ve", objective__prediction="edm", objective__weighting="edm"),
        dict(objective__schedule="zero_terminal_snr(scaled_linear)", objective__times="discrete"),
        dict(objective__schedule="linear", objective__times="discrete")
        | dict(objective__terms=("variational_bound(weight=0.01)",), sampler__solver="ddpm"),
        dict(objective__weighting="elbo", objective__schedule="vp_sde"),
        dict(objective__terms="uncertainty()", objective__times="log_normal(mean=-0.5)"),
        dict(objective__name="consistency", consistency__solver="euler"),
        dict(model__name="dit", model__dit__scan=True, model__dit__positions="rotary"),
    ],
    ids=str,
)
def test_combinations_build(overrides):
    build(with_fields(digits.get_config(), **overrides))


def test_unconditional_runs_without_guidance():
    config = with_fields(digits.get_config(), objective__conditional=False)
    experiment = build(config)
    assert experiment.num_classes == 0
    assert "no effect" in experiment.notes[0]


@pytest.fixture(scope="module")
def objective():
    return build(digits.get_config()).objective


# Solvers that jump back need more steps, a table from a file needs its own number of them.
ANY_STEPS = sorted(set(solvers.CHOICES) - {"from_file", "repaint", "restart"})


@pytest.mark.parametrize("name", ANY_STEPS)
def test_every_solver_takes_every_grid_from_one_step_on(objective, name):
    given = ["from_times(times=[1, 0.6, 0.3, 0])", "from_sigmas(sigmas=[80, 5, 0.5, 0])"]
    named = [grid for grid in grids.CHOICES if not grid.startswith(("from_", "flow_"))]
    for grid, steps in [*itertools.product(named, (1, 2, 5)), *itertools.product(given, [7])]:
        fields = dict(sampler__solver=name, sampler__grid=grid, sampler__steps=steps)
        solver = make_solver(with_fields(digits.get_config(), **fields), objective)
        steps = 3 if grid in given else steps
        assert solver.evaluations >= steps


@pytest.mark.parametrize("name", ["restart", "repaint(jump_length=2, resamples=3)"])
def test_solvers_that_jump_back(objective, name):
    fields = dict(sampler__solver=name, sampler__grid="karras", sampler__steps=20)
    solver = make_solver(with_fields(digits.get_config(), **fields), objective)
    assert solver.evaluations > 20


@pytest.mark.parametrize("grid", ["flow_shift(shift=2.0)", "flow_shift_for(tokens=1024)"])
def test_grids_of_flows(grid):
    fields = dict(sampler__grid=grid, objective__schedule="rectified_flow")
    times = build(with_fields(digits.get_config(), **fields)).solver.level.t
    assert times[0] == 1 and 1 > times[10] > 0.5
    with pytest.raises(ValueError, match="needs no signal at t_max"):
        build(with_fields(digits.get_config(), sampler__grid=grid))


@pytest.mark.parametrize(
    "grid, notes",
    [
        ("from_sigmas(sigmas=[80, 5, 0])", ["the levels of 2 steps"]),
        (
            "from_times(times=[0.5, 0.3, 0.1])",
            ["the levels of 2 steps", "starts at sigma / alpha = 1.01", "keep noise of .* = 0.169"],
        ),
    ],
)
def test_what_is_odd_about_given_levels_is_noted(grid, notes):
    said = build(with_fields(digits.get_config(), sampler__grid=grid)).notes
    assert len(said) == len(notes)
    for note, pattern in zip(said, notes):
        assert re.search(pattern, note)


def test_toy2d_builds():
    assert build(toy2d.get_config()).train.shape == (2,)


@pytest.mark.parametrize(
    "module, shape, classes, millions",
    [
        (mnist, (28, 28, 1), 10, None),
        (cifar10_ddpm, (32, 32, 3), 10, 35.7),
        (cifar10_edm, (32, 32, 3), 10, None),
        (cifar10_flow, (32, 32, 3), 10, None),
        (imagenet256_dit_xl2, (32, 32, 4), 1000, 674.8),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_configs_of_larger_data_build(monkeypatch, module, shape, classes, millions):
    """Without the data: a stand-in of their shape, parameters counted without being made."""
    config = module.get_config()
    height = shape[0] + 2 * config.data.padding
    x = jax.numpy.zeros((4, height, height, shape[-1]))
    source = sources.from_arrays("stand-in", x, label=range(4), num_classes=classes)
    monkeypatch.setattr(builder, "make_source", lambda *_: source)
    experiment = build(config)
    batch = {name: value[None] for name, value in source[0].items()}
    params = jax.eval_shape(experiment.objective.init, jax.random.key(0), batch)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    if millions is not None:
        assert count / 1e6 == pytest.approx(millions, abs=0.1)
