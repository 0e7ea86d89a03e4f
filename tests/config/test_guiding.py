"""Guidance as config.sampler says it: every method draws, every impossible one is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from diffusion.modes.drawer import Drawer

from configs import digits, digits_classifier, toy2d
from diffusion.conditioning import Conditioning
from diffusion.config import reference_runs
from diffusion.config.experiment import build
from diffusion.denoiser import as_estimate
from diffusion.levels import NoiseLevel
from diffusion.runs import workdir as workdirs


def small(module, **overrides):
    c = module.get_config()
    c.model.unet.update(widths=(4, 4), norm_groups=2, num_heads=2, attention=0)
    c.model.dit.update(width=16, depth=2, heads=2)
    c.sampler.steps, c.sampler.batch_size, c.sampler.guidance = 3, 4, "cfg(2), clip()"
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
        workdirs.save_config(found[name], config.to_dict())
        (found[name] / "checkpoints" / "1").mkdir(parents=True)
    return found


def setting(runs, text):
    """Fields of "links; negative=value"; @name is a run's directory."""
    links, _, negative = text.partition("; negative=")
    for name, directory in runs.items():
        links = links.replace(f"@{name}", repr(str(directory)))
    return {"sampler__guidance": links} | ({"samples__negative": int(negative)} if negative else {})


X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1)), jnp.float32)
COND = Conditioning(label=jnp.array([1, 6]))
LEVEL = NoiseLevel(*map(jnp.float32, (0.5, 0.8, 0.6)))
GOOD, NULL, EIGHT = (0.1 * X + 0.02 * k for k in (COND.label.reshape(2, 1, 1, 1), 10, 8))
WEAK = -0.1 * X


def model(x, level, cond):
    return 0.1 * x + 0.02 * cond.label.reshape(-1, 1, 1, 1)


NETWORKS = {
    "model": model,
    "weak": lambda x, level, cond: -0.1 * x,
    "classifier": lambda x, level: x.reshape(len(x), -1)[:, :10],
}


def score():
    """grad log softmax(x_0..x_9)[label]."""
    flat = np.asarray(X.reshape(2, -1))[:, :10]
    p = np.exp(flat) / np.exp(flat).sum(1, keepdims=True)
    gradient = np.zeros((2, 64))
    gradient[:, :10] = np.eye(10)[[1, 6]] - p
    return gradient.reshape(X.shape)


METHODS = [
    ("cfg(2)", 2 * GOOD - NULL),
    ("cfg(1)", GOOD),
    ("", GOOD),
    ("cfg(2); negative=8", 2 * GOOD - EIGHT),
    ("cfg(2), interval(0.2, 0.7)", GOOD),
    ("cfg(2), interval(0.2, 0.8)", 2 * GOOD - NULL),
    ("autoguidance(@weak, 2)", 2 * GOOD - WEAK),
    ("classifier(@classifier, scale=2)", GOOD + 2 * 0.36 / 0.8 * score()),
    ("cfg(1), perturbed_attention(2)", GOOD),  # these networks have no attention
    ("cfg(200)", NULL + 200 * (GOOD - NULL)),
    ("cfg(200), clip()", jnp.clip(NULL + 200 * (GOOD - NULL), -1, 1)),
    ("cfg(200), dynamic_threshold(largest=1)", jnp.clip(NULL + 200 * (GOOD - NULL), -1, 1)),
]


@pytest.mark.parametrize("text, expected", METHODS, ids=lambda value: str(value)[:40])
def test_settings_mean_their_equations(runs, text, expected):
    guide = build(small(digits, **setting(runs, text))).guidance
    x0 = as_estimate(guide.guide(NETWORKS, COND, guide.chain)(X, LEVEL)).x0
    np.testing.assert_allclose(x0, expected, atol=1e-4)


def test_other_schedules_are_translated(runs):
    """The classifier is asked about the same example on its own schedule."""
    asked = []

    def classify(x, level):
        asked.append((x, level))
        return x.reshape(len(x), -1)[:, :10]

    guide = build(small(digits, **setting(runs, "classifier(@edm_classifier)"))).guidance
    run = guide.runs["classifier"]
    assert not run.same_schedule
    reference_runs.at_its_levels(classify, run)(X, LEVEL)
    x, level = asked[0]
    np.testing.assert_allclose([level.alpha, level.sigma], [1.0, 0.75], rtol=1e-5)
    np.testing.assert_allclose(x, X / 0.8, rtol=1e-5)


def test_draws_with_everything_at_once(runs, monkeypatch):
    """An unconditional model told what to draw by a classifier; memory, PAG, two networks."""
    monkeypatch.setattr(reference_runs.Run, "params", lambda run: parameters(run.objective, 0.2))
    text = "autoguidance(@unconditional, 2), adaptive_projected(0.5), perturbed_attention(1), "
    text += "classifier(@classifier), interval(high=5), clip()"
    fields = setting(runs, text) | {"objective__conditional": False}
    experiment = build(small(digits, **fields))
    assert experiment.num_classes == 0 and experiment.guidance.num_classes == 10
    drawer, params = Drawer(experiment), parameters(experiment.objective, 0.3)
    x, label = drawer.draw(params, 4)
    np.testing.assert_array_equal(label, range(4))
    assert np.isfinite(x).all() and np.abs(x).max() <= 1
    assert np.abs(x[0] - x[1]).max() > 1e-3


MISTAKES = [
    ("cfg(2), rescal(0.7)", r"guidance: unknown 'rescal'.*Did you mean 'rescale'"),
    ("cfg(2), rescale(2)", r"guidance=.*phi must lie in \[0, 1\]"),
    ("cfg('strong')", r"guidance=.*scale must be a number"),
    ("rescale(0.7), cfg(2)", r"guidance=.*cfg guides the model itself: it stands before rescale"),
    ("instruct(7.5, 1.5)", r"guidance=.*instruct guides networks that edit pictures"),
    ("cfg(2); negative=10", r"samples\.negative=10 is no label; choose 0\.\.9"),
    ("autoguidance(@weak, 2); negative=3", r"config\.samples\.negative=3 has no place there"),
    ("autoguidance('/nowhere', 2)", r"autoguidance's run='/nowhere' is not the workdir of a run"),
    ("autoguidance(@classifier, 2)", r"run=.* holds a run of classification; expected deno"),
    ("classifier(@weak)", r"classifier's run=.* holds a run of denoising; .*digits_classifier"),
    ("dynamic", r"unknown 'dynamic'; .*Did you mean 'dynamic_threshold'"),
    (
        "cfg(1), perturbed_attention(1, 'attic')",
        r"blocks='attic' names no self-attention of this network; it has mid_block/att",
    ),
    ("cfg(1), perturbed_attention(1, '(')", r"blocks='\(' is no regular"),
]


@pytest.mark.parametrize("text, message", MISTAKES, ids=lambda value: value[:40])
def test_mistakes_are_named(runs, text, message):
    with pytest.raises(ValueError, match=message) as error:
        build(small(digits, **setting(runs, text)))
    assert "config.sampl" in str(error.value)


def test_what_does_not_fit_the_model_is_named(runs):
    unconditional = dict(objective__conditional=False)
    for fields, message in [
        (unconditional | {"samples__negative": 1}, "this model has none"),
        (unconditional | setting(runs, "autoguidance(@weak, 2)"), "is class-conditional"),
        ({"samples__negative": "red"}, r"samples\.negative='red': this model knows no captions"),
        (
            dict(objective__schedule="rectified_flow", objective__prediction="flow")
            | {"sampler__guidance": "cfg(2), rescale(space='eps')"},
            "says nothing about x_0 at alpha = 0",
        ),
        (
            dict(model__name="dit", model__dit__scan=True)
            | {"sampler__guidance": "cfg(1), perturbed_attention(1, 'blocks_1')"},
            "it has blocks/attn/",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            build(small(digits, **fields))
    toy = toy2d.get_config()
    toy.sampler.guidance = "cfg(1), perturbed_attention(1)"
    with pytest.raises(ValueError, match="names no self-attention of this network; it has none"):
        build(toy)
    with pytest.raises(ValueError, match=r"config\.objective\.name='classification' needs labels"):
        build(small(toy2d, objective__name="classification"))
    with pytest.raises(ValueError, match=r"config\.model\.name='dit': a classifier is the encoder"):
        build(small(digits_classifier, model__name="dit"))
    with pytest.raises(ValueError, match=r"config\.objective\.name: unknown 'clasification'"):
        build(small(digits, objective__name="clasification"))


def test_a_bare_number_is_refused():
    with pytest.raises(ValueError, match=r"guidance=3.0: expected texts such as 'cfg\(3.0\)'"):
        build(small(digits, sampler__guidance=3.0))


def test_settings_without_effect_are_noted():
    def notes(**fields):
        return build(small(digits, **fields)).notes

    alone = notes(sampler__guidance="cfg(1), rescale()", samples__negative=3)
    assert "the model alone: rescale, samples.negative has no effect" in alone[0]
    assert "has no effect without cfg" in notes(sampler__guidance="", samples__negative=3)[0]
    negative = dict(objective__label_dropout=0.0, samples__negative=3)
    assert notes(**negative) == ()  # a label to steer away from needs no null class
    assert notes() == ()
