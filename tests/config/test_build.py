"""From a config to an experiment: fields that do not fit together stop it, and are named.

What a single function refuses is tested beside it; here is one case for each kind of field, to see
that its message names the field.
"""

import re

import jax
import numpy as np
import pytest

from configs import (
    cifar10_ddpm,
    cifar10_edm,
    cifar10_flow,
    digits,
    digits_classifier,
    few_steps2d,
    imagenet256_dit_xl2,
    mnist,
    toy2d,
)
from diffusion.config import experiment as builder
from diffusion.config import optimizer
from diffusion.config.experiment import build
from diffusion.data import sources


def with_fields(config, **overrides):
    for name, value in overrides.items():
        config.update_from_flattened_dict({name.replace("__", "."): value})
    return config


SPECS = [  # a field of each kind, with a value that its function or constructor refuses
    (dict(model__name="dit", model__dit__heads=5), r"config\.model\.dit: heads=5 must divide"),
    (dict(model__unet__widths=("a", 3)), r"config\.model\.unet: an option has a wrong type"),
    (dict(objective__schedule="cosin"), r"objective\.schedule: unknown 'cosin'.*mean 'cosine'"),
    (dict(objective__schedule="shifted(cosine, -1)"), r"objective\.schedule='shifted.*-1"),
    (dict(objective__schedule="zero_terminal_snr(vp_sde)"), r"^config\.objective\.schedule='zero"),
    (dict(objective__prediction="edm(sigma_data=-1)"), r"objective\.prediction='edm.*sigma_data m"),
    (dict(objective__c_noise="ddpm_index(steps=0)"), r"objective\.c_noise='ddpm.*steps must be"),
    (dict(objective__weighting="sigmoid(bias=-1e9)"), r"objective\.weighting=.* 0 at all times"),
    (
        dict(objective__coupling="nearest(k=100000000)"),
        r"objective\.coupling=.*k must lie in",
    ),
    (dict(objective__noise="gaussian(offset=inf)"), r"objective\.noise=.*offset must lie in"),
    (dict(sampler__corrector="langevin(snr=inf)"), r"sampler\.corrector=.*snr=inf"),
    (dict(objective__prediction="epsilon"), r"config\.objective\.prediction: unknown 'epsilon'"),
    (dict(objective__c_noise="index"), r"config\.objective\.c_noise: unknown 'index'"),
    (dict(objective__times="logitnormal"), r"config\.objective\.times: .*mean 'logit_normal'"),
    (dict(objective__weighting="min_snr(gamma='a')"), r"objective\.weighting: .*expected float"),
    (dict(objective__distance="l3"), r"config\.objective\.distance: unknown 'l3'"),
    (dict(optimizer__name="adamax"), r"config\.optimizer: unknown optimizer 'adamax'"),
    (dict(ema="constant(decay=1.5)"), r"config\.ema: an EMA's decay must lie in \[0, 1\)"),
    (dict(parallel="zero"), r"config\.parallel: unknown parallel='zero'; choose one of pmap, fsdp"),
    (dict(sampler__average="emma"), r"config\.sampler: average: unknown 'emma'.*mean 'ema'"),
    (dict(sampler__solver="dpm"), r"config\.sampler\.solver: unknown 'dpm'"),
    (dict(sampler__grid="karass"), r"config\.sampler\.grid: unknown 'karass'"),
    (dict(sampler__guidance="cgf(2)"), r"config\.sampler\.guidance: unknown 'cgf'"),
    (dict(sampler__acceleration="cash()"), r"config\.sampler\.acceleration: unknown 'cash'"),
    (dict(sampler__corrector="langevine"), r"config\.sampler\.corrector: unknown 'langevine'"),
    (dict(samples__labels=(3, 10)), r"config\.samples: there is no class 10"),
    (dict(evaluation__metrics="retrievl()"), r"config\.evaluation\.metrics: .*mean 'retrieval'"),
    (
        dict(train__snapshot_every=5, train__snapshot_sigma_rel=(0.5,)),
        r"config\.train\.snapshot_sigma_rel: sigma_rel must lie in",
    ),
]

FIELDS = [  # the configuration's own
    (dict(model__name="vit"), r"model\.name: unknown 'vit'; choose one of dit, mlp, pretrained, u"),
    (dict(model__dtype="float16"), r"config\.model\.dtype: unknown 'float16'; .*Did you mean"),
    (dict(objective__name="clasification"), r"config\.objective\.name: unknown 'clasification'"),
    (dict(train__batch_size=127), r"config\.train\.batch_size=127 is not divisible by 4.*124 or"),
    (
        dict(train__snapshot_every=5, train__snapshot_sigma_rel=(0.1, 0.1)),
        r"config\.train\.snapshot_sigma_rel: expected one or more different widths",
    ),
    (
        dict(objective__name="few_steps", few_steps__method="consistency(solver='rk4')"),
        r"config\.few_steps\.method.*solver: unknown 'rk4'; choose one of euler, heun",
    ),
    (
        dict(objective__name="few_steps", few_steps__method="consistency(target='emma')"),
        r"config\.few_steps\.method.*target: unknown 'emma'.*mean 'ema'",
    ),
    (
        dict(objective__name="few_steps", few_steps__method="meanflow()"),
        r"config\.few_steps\.method: unknown 'meanflow'.*mean 'mean_flow'",
    ),
    (
        dict(objective__name="few_steps", few_steps__method="consistency(nodes(0))"),
        r"config\.few_steps\.method.*count must lie in",
    ),
    (
        dict(objective__name="few_steps", few_steps__method="consistency(18)"),
        r"config\.few_steps\.method.*pairs=18",
    ),
    (
        dict(objective__name="few_steps", few_steps__method="progressive(4)"),
        r"method='progressive\(4\)' needs a teacher",
    ),
    (
        dict(objective__name="few_steps", few_steps__method="shortcut()", few_steps__teacher="x"),
        r"learns from the data, not from config\.few_steps\.teacher",
    ),
    (
        dict(objective__name="few_steps", few_steps__method="distribution_matching(steps=4)"),
        r"method='distribution_matching\(steps=4\)' needs a teacher",
    ),
    (
        dict(objective__name="few_steps", few_steps__method="flash(solver_steps=30)"),
        r"config\.few_steps\.method.*solver_steps=30 must be a multiple of 4; nearest: 28 or 32",
    ),
    (
        dict(objective__name="few_steps", few_steps__method="adversarial(features=dino)"),
        r"config\.few_steps\.method: unknown 'dino'.*mean 'dinov2'",
    ),
    (
        dict(
            objective__name="few_steps",
            few_steps__method="adversarial(features=classifier('nowhere'), distillation=0.0)",
        ),
        r"config\.few_steps\.method=.*nowhere is not the workdir of a run",
    ),
    (
        dict(objective__name="few_steps", few_steps__guidance=3.0),
        r"config\.few_steps\.guidance=3\.0 is of a teacher",
    ),
    (
        dict(
            objective__name="few_steps",
            few_steps__teacher="x",
            few_steps__guidance=(3.0, 2.0),
        ),
        r"config\.few_steps\.guidance=\(3\.0, 2\.0\).*the highest scale",
    ),
    (
        dict(objective__name="few_steps", few_steps__teacher="base"),
        r"config\.few_steps\.teacher='base' is the model beside an adapter",
    ),
    (
        dict(objective__name="few_steps", model__unet__guidance_width=16),
        r"config\.model\.unet\.guidance_width is for the scale of a teacher's guidance",
    ),
    (
        dict(objective__name="few_steps", few_steps__teacher="nowhere"),
        r"config\.few_steps\.teacher='nowhere': nowhere is not the workdir of a run",
    ),
]

COMBINATIONS = [
    (dict(model__name="mlp"), r"config\.model\.name='mlp' does not take images.*unet or dit"),
    (dict(model__name="dit", model__dit__patch=3), r"(?s)8.*patch=3.*nearest"),
    (
        dict(model__unet__widths=(16, 16, 16, 16, 16), model__unet__attention=0),
        r"config\.model\.unet: image size 8 is too small for 5 widths.*nearest: 9",
    ),
    (
        dict(objective__prediction="eps", objective__schedule="rectified_flow"),
        r"the model's prediction says nothing about x_0 at alpha = 0, .* config\.sampler\.grid; ",
    ),
    (
        dict(
            objective__prediction="eps",
            objective__schedule="zero_terminal_snr(scaled_linear)",
            sampler__grid="uniform",
        ),
        r"prediction says nothing",
    ),
    (
        dict(objective__schedule="rectified_flow", objective__c_noise="log_sigma"),
        r"the model's c_noise is infinite",
    ),
    (dict(objective__t_min=1.0), r"config\.objective\.t_min=1\.0 must lie below .*1\.0"),
    (
        dict(objective__terms="variational_bound()"),
        r"config\.objective\.terms='variational_bound\(\)': it bounds a chain of discrete steps",
    ),
    (
        dict(objective__name="few_steps", objective__weighting="snr"),
        r"config\.objective\.weighting='snr' has no part in .*'few_steps'; leave it at 'simple'",
    ),
    (
        dict(objective__name="few_steps", objective__prediction="x0"),
        r"config\.objective\.prediction='x0' does not give x back.*choose v, flow, edm or eps",
    ),
    (dict(few_steps__teacher="nowhere"), r"teacher='nowhere' is for .*'few_steps', not 'den"),
    (
        dict(objective__label_dropout=0.0),
        r"config\.sampler\.guidance=\('cfg\(1\.5\)', 'clip\(\)'\) needs a model",
    ),
    (
        dict(train__keep_best=2, train__best="validation_loss"),
        r"config\.train\.best='validation_loss' needs config\.train\.validate_every",
    ),
    (dict(objective__name="autoencoding"), r"config\.model\.name='unet': .* trains an autoencoder"),
]


@pytest.mark.parametrize(
    "overrides, message", SPECS + FIELDS + COMBINATIONS, ids=lambda value: str(value)[:50]
)
def test_mistakes_are_named(overrides, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build(with_fields(digits.get_config(), **overrides))


@pytest.mark.parametrize(
    "module, overrides, message",
    [
        (
            toy2d,
            dict(data__flip=True),
            r"config\.data\.flip=True mirrors images, and two_moo",
        ),
        (
            toy2d,
            dict(objective__name="classification"),
            r"config\.objective\.name='classification' needs labels",
        ),
        (
            digits_classifier,
            dict(model__name="dit"),
            r"config\.model\.name='dit': a classifier is the encoder of a unet",
        ),
        (
            digits_classifier,
            dict(objective__terms="uncertainty()"),
            r"config\.objective\.terms=.*change the loss of config\.objective\.name='denoising'",
        ),
        (
            toy2d,
            dict(
                objective__name="few_steps",
                few_steps__method="adversarial(features=dinov2('x'), distillation=0.0)",
            ),
            r"dinov2 sees pictures, and this model makes examples of shape \(2,\)",
        ),
        (few_steps2d, dict(few_steps__teacher=""), r"config\.train\.init_from='runs/toy2d'"),
    ],
)
def test_what_does_not_fit_the_objective_is_named(module, overrides, message):
    config = module.get_config()
    if module is few_steps2d:  # the teacher's reference is cut
        config.few_steps = config.few_steps.copy_and_resolve_references()
    with pytest.raises(ValueError, match=message):
        build(with_fields(config, **overrides))


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
        dict(objective__name="few_steps", few_steps__method="consistency(solver='euler')"),
        dict(objective__name="few_steps", few_steps__method="mean_flow()")
        | dict(sampler__solver="euler"),
        dict(objective__name="few_steps", few_steps__method="shortcut()", model__name="dit")
        | dict(sampler__solver="ddim"),
        dict(objective__name="few_steps", few_steps__method="drifting()"),
        dict(model__name="dit", model__dit__scan=True, model__dit__positions="rotary"),
    ],
    ids=str,
)
def test_combinations_build(overrides):
    build(with_fields(digits.get_config(), **overrides))


def test_unconditional_runs_without_guidance():
    experiment = build(with_fields(digits.get_config(), objective__conditional=False))
    assert experiment.description.num_classes == 0 and not experiment.drawer.paired
    assert "no effect" in experiment.notes[0]


def test_a_classifier_and_a_denoiser_describe_their_models():
    found = build(digits_classifier.get_config())
    assert found.drawer is None and found.description.network == "classifier"
    found = build(digits.get_config())
    assert found.description.network == "unet" and found.description.null
    assert found.description.sampler == ("dpmpp_2m", "auto", 20, ("cfg(1.5)", "clip()"))


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
    x = np.zeros((4, height, height, shape[-1]))
    source = sources.from_arrays("stand-in", x, label=range(4), num_classes=classes)
    monkeypatch.setattr(builder, "make_source", lambda *_: source)
    experiment = build(config)
    batch = {name: value[None] for name, value in source[0].items()}
    params = jax.eval_shape(experiment.objective.init, jax.random.key(0), batch)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    if millions is not None:
        assert count / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize(
    "overrides, note",
    [
        (dict(objective__times="uniform"), r"times='uniform' .*: 96% of"),
        (dict(sampler__grid="uniform"), r"grid='uniform' spends 100% of"),
    ],
)
def test_times_and_grids_in_strong_noise_alone_are_noted(overrides, note):
    edm = dict(objective__schedule="edm")
    usual = build(with_fields(digits.get_config(), **edm)).notes
    notes = build(with_fields(digits.get_config(), **edm, **overrides)).notes
    assert [n for n in notes if n not in usual and re.search(note, n)]
    assert not any(re.search("times=|grid=", n) for n in usual)


@pytest.mark.parametrize("warmup, odd", [(10, False), (11, True)])
def test_a_warm_up_longer_than_the_run_is_noted(warmup, odd):
    fields = dict(train__steps=10, optimizer__warmup=warmup, optimizer__decay="constant")
    notes = optimizer.notes(with_fields(digits.get_config(), **fields))
    assert len(notes) == odd and all("warmup=11 is longer than" in note for note in notes)


@pytest.mark.parametrize(
    "before, steps, done, rise",
    [
        (dict(decay="cosine", warmup=10), 200, 100, r", 0 after 100 steps, rises to 0\.5"),
        (dict(decay="cosine", warmup=10), 100, 50, ""),  # interrupted
        (dict(decay="constant", warmup=10), 200, 3, ""),  # interrupted while it warms up
        (dict(decay="constant", warmup=10), 200, 100, ""),
        (dict(decay="cosine", warmup=10), 100, 100, ""),  # done
    ],
)
def test_a_learning_rate_that_rises_again_is_noted(before, steps, done, rise):
    old = digits.get_config()
    old.optimizer.update(before | {"learning_rate": 1.0, "decay_start": 0})
    old.train.steps = 100
    new = old.copy_and_resolve_references()
    new.train.steps = steps
    notes = optimizer.resumption_notes(new, old, done)
    assert re.search(rise, notes[0]) if rise else not notes
