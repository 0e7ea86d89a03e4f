"""Guidance as config.sampler says it: every method draws, every impossible one is refused."""

import jax
import numpy as np
import pytest

from configs import digits, digits_classifier, toy2d
from diffusion import guiding
from diffusion.build import build
from diffusion.drawing import Drawer
from diffusion.training import checkpoints


def small(module, **overrides):
    c = module.get_config()
    c.model.unet.update(widths=(8, 8), norm_groups=4, num_heads=2, attention=0)
    c.model.dit.update(width=16, depth=2, heads=2)
    c.sampler.steps, c.sampler.batch_size, c.sampler.guidance = 3, 4, 2.0
    for name, value in overrides.items():
        c.update_from_flattened_dict({name.replace("__", "."): value})
    return c


def parameters(objective, scale):
    batch = {"x": np.zeros((1, 8, 8, 1), np.float32), "label": np.zeros(1, np.int32)}
    shapes = jax.eval_shape(objective.init, jax.random.key(0), batch)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: scale * rng.standard_normal(s.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a weak model, an EDM one, an unconditional one and a classifier."""
    configs = {
        "weak": small(digits),
        "other": small(digits, objective__schedule="edm", objective__prediction="edm"),
        "unconditional": small(digits, objective__conditional=False),
        "classifier": small(digits_classifier),
        "edm_classifier": small(
            digits_classifier, objective__schedule="edm", objective__prediction="edm"
        ),
    }
    found = {}
    for name, config in configs.items():
        found[name] = tmp_path_factory.mktemp(name)
        checkpoints.save_config(found[name], config.to_dict())
        (found[name] / "checkpoints" / "1").mkdir(parents=True)
    return found


def setting(runs, text):
    """sampler fields from "name=value ..."; @name is a run's directory."""
    fields = {}
    for name, value in (part.split("=", 1) for part in text.split(" ")):
        kind = type(digits.get_config().sampler[name])
        value = str(runs[value[1:]]) if value[0] == "@" else value
        fields[f"sampler__{name}"] = value == "True" if kind is bool else kind(value)
    return fields


METHODS = [
    "guidance=2",
    "guidance=1",
    "guidance_split=True",
    "negative=8",
    "guidance_low=0.2 guidance_high=3",
    "guidance_method=rescaled(phi=0.7)",
    "guidance_method=adaptive_projected(norm_threshold=2.5,momentum=-0.5)",
    "guidance=1 perturbed_attention=2",
    "autoguidance=@weak",
    "autoguidance=@other",
    "classifier=@classifier classifier_scale=2",
    "classifier=@edm_classifier guidance=1",
    "threshold=dynamic_threshold(quantile=0.9,largest=1.5)",
    "autoguidance=@weak classifier=@classifier perturbed_attention=1 guidance_high=5 "
    "guidance_method=adaptive_projected(eta=0.5)",
]


def test_every_method_draws(runs, monkeypatch):
    """Finite, in range, and (but for where the calls are made) all different."""

    monkeypatch.setattr(guiding.Run, "params", lambda run: parameters(run.objective, 0.2))
    params, drawn = None, {}
    for text in METHODS:
        experiment = build(small(digits, **setting(runs, text)))
        params = parameters(experiment.objective, 0.3) if params is None else params
        x, label = Drawer(experiment).draw(params, 4)
        assert np.isfinite(x).all() and np.abs(x).max() <= 1, text
        np.testing.assert_array_equal(label, range(4))
        drawn[text] = x
    same = {"guidance=2", "guidance_split=True"}
    np.testing.assert_allclose(*(drawn.pop(text) for text in same), atol=1e-4)
    images = list(drawn.values())
    for i, image in enumerate(images):
        for other in images[:i]:
            assert np.abs(image - other).max() > 1e-4


def test_a_classifier_makes_an_unconditional_model_conditional(runs, monkeypatch):
    monkeypatch.setattr(guiding.Run, "params", lambda run: parameters(run.objective, 0.2))
    classifier = str(runs["classifier"])
    config = small(digits, objective__conditional=False, sampler__classifier=classifier)
    config.sampler.guidance = 1.0
    experiment = build(config)
    assert experiment.num_classes == 0 and experiment.guidance.num_classes == 10
    drawer, params = Drawer(experiment), parameters(experiment.objective, 0.3)
    _, label = drawer.draw(params, 4)
    np.testing.assert_array_equal(label, range(4))
    assert np.isfinite(drawer.trajectory(params, 2)[0]).all()


MISTAKES = [
    ("guidance_method=rescale", r"guidance_method: unknown 'rescale'.*Did you mean 'rescaled'"),
    ("guidance_method=rescaled(phi=2.0)", r"guidance_method=.*phi must lie in \[0, 1\]"),
    ("guidance_method=rescaled(space='e')", r"guidance_method: space: unknown 'e'; .*edm, eps"),
    ("guidance_method=adaptive_projected(momentum=-2.0)", r"guidance_method=.*momentum must lie"),
    ("guidance_low=3 guidance_high=2", r"guidance_low < guidance_high .*got 3.0 and 2.0"),
    ("negative=10", r"negative=10 is no label; choose 0\.\.9"),
    ("autoguidance=@weak negative=3", r"config\.sampler\.negative has no place there"),
    ("autoguidance=/nowhere", r"autoguidance='/nowhere' is not the workdir of a run"),
    ("autoguidance=@classifier", r"autoguidance=.* holds a run of classification; expected deno"),
    ("classifier=@weak", r"classifier=.* holds a run of denoising; .*digits_classifier"),
    ("threshold=dynamic", r"threshold: unknown 'dynamic'; .*Did you mean 'dynamic_threshold'"),
    ("threshold=dynamic_threshold(quantile=3.0)", r"threshold=.*quantile must lie in \(0, 1\]"),
    (
        "perturbed_attention=1 perturbed_blocks=attic",
        r"perturbed_blocks='attic' names no self-attention of this unet; it has mid_block/att",
    ),
    ("perturbed_attention=1 perturbed_blocks=(", r"perturbed_blocks='\(': "),
]


@pytest.mark.parametrize("text, message", MISTAKES, ids=lambda value: value[:40])
def test_mistakes_are_named(runs, text, message):
    with pytest.raises(ValueError, match=message) as error:
        build(small(digits, **setting(runs, text)))
    assert "config.sampler." in str(error.value)


def test_what_does_not_fit_the_model_is_named(runs):
    unconditional = dict(objective__conditional=False)
    for fields, message in [
        (unconditional | {"sampler__negative": 1}, "this model has none"),
        (unconditional | {"sampler__autoguidance": str(runs["weak"])}, "is class-conditional"),
        (
            dict(objective__schedule="rectified_flow", objective__prediction="flow")
            | {"sampler__guidance_method": "rescaled(space='eps')"},
            "says nothing about x_0 at alpha = 0",
        ),
        (
            dict(model__name="dit", model__dit__scan=True, sampler__perturbed_attention=1.0)
            | {"sampler__perturbed_blocks": "blocks_1"},
            "it has blocks/attn/",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            build(small(digits, **fields))
    toy = toy2d.get_config()
    toy.sampler.perturbed_attention = 1.0
    with pytest.raises(ValueError, match="names no self-attention of this mlp; it has none"):
        build(toy)
    with pytest.raises(ValueError, match=r"config\.objective\.name='classification' needs labels"):
        build(small(toy2d, objective__name="classification"))
    with pytest.raises(ValueError, match=r"config\.model\.name='dit': a classifier is the encoder"):
        build(small(digits_classifier, model__name="dit"))
    with pytest.raises(ValueError, match=r"config\.objective\.name: unknown 'clasification'"):
        build(small(digits, objective__name="clasification"))


def test_settings_without_effect_are_noted():
    assert "no effect" in build(small(digits, sampler__guidance=1.0, sampler__negative=3)).notes[0]
    assert "without classifier" in build(small(digits, sampler__classifier_scale=2.0)).notes[0]
    negative = small(digits, objective__label_dropout=0.0, sampler__negative=3)
    assert build(negative).notes == ()  # a label to steer away from needs no null class
    assert build(small(digits)).notes == ()
