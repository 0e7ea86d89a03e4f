"""Guidance as config.sampler says it: every method draws, every impossible one is refused."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, digits_classifier, toy2d
from diffusion.conditioning import Conditioning
from diffusion.config import contents, drawing, model
from diffusion.config.data import make_source
from diffusion.denoiser import as_estimate
from diffusion.levels import NoiseLevel
from diffusion.pipelines import description
from diffusion.pipelines.from_run import Run
from diffusion.sampling.guidance.chain import Branches, guide


def small(module, **overrides):
    c = module.get_config()
    c.model.unet.update(widths=(4, 4), norm_groups=2, num_heads=2, attention=0)
    c.model.dit.update(width=16, depth=2, heads=2)
    c.sampler.steps, c.sampler.batch_size, c.sampler.guidance = 3, 4, "cfg(2), clip()"
    for name, value in overrides.items():
        c.update_from_flattened_dict({name.replace("__", "."): value})
    return c


def described(config):
    return model.describe(config, *(make_source(config.data, split) for split in ("train", "test")))


def drawer(config):
    """The drawer and the notes, without a training objective."""
    found = described(config)
    return drawing.drawer(config, description.pipeline(found), found.schedule)


def parameters(found, scale):
    """Random ones, of the network of a description."""
    x, t = np.zeros((1, 8, 8, 1), np.float32), np.ones(1, np.float32)
    cond = Conditioning(label=np.zeros(1, np.int32))
    if found.network == "classifier":
        objective = description.classification(found)
        shapes = jax.eval_shape(objective.init, jax.random.key(0), {"x": x})["network"]
    else:
        network = description.network(found)
        shapes = jax.eval_shape(network.init, jax.random.key(0), x, t, cond)["params"]
    rng = np.random.default_rng(0)
    return {"network": jax.tree.map(lambda s: scale * rng.standard_normal(s.shape, "f4"), shapes)}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Workdirs of a weak model, an EDM one, an unconditional one and a classifier."""
    edm = dict(objective__schedule="edm", objective__prediction="edm")
    configs = {
        "weak": small(digits),
        "other": small(digits, **edm),
        "unconditional": small(digits, objective__conditional=False),
        "classifier": small(digits_classifier),
        "edm_classifier": small(digits_classifier, **edm),
    }
    found = {}
    for name, config in configs.items():
        found[name] = tmp_path_factory.mktemp(name)
        description.write(found[name], described(config))
    with pytest.MonkeyPatch.context() as patch:
        restored = property(lambda run: (parameters(run.description, 0.2), 1))
        patch.setattr(Run, "restored", restored)
        yield found


def setting(runs, text):
    """Fields of "links; negative=value"; @name is a run's directory."""
    links, _, negative = text.partition("; negative=")
    for name, directory in runs.items():
        links = links.replace(f"@{name}", repr(str(directory)))
    return {"sampler__guidance": links} | ({"samples__negative": int(negative)} if negative else {})


X = jnp.asarray(np.random.default_rng(0).standard_normal((2, 8, 8, 1)), jnp.float32)
LABELS = np.array([1, 6])
LEVEL = NoiseLevel(*map(jnp.float32, (0.5, 0.8, 0.6)))
GOOD, NULL, EIGHT = (0.1 * X + 0.02 * k for k in (LABELS.reshape(2, 1, 1, 1), 10, 8))
WEAK = -0.1 * X
NETWORKS = {
    "weak": lambda x, level, cond: -0.1 * x,
    "classifier": lambda x, level: x.reshape(len(x), -1)[:, :10],
}


def denoise(x, level, cond):
    return 0.1 * x + 0.02 * cond.label.reshape(-1, 1, 1, 1)


def score():
    """grad log softmax(x_0..x_9)[label]."""
    flat = np.asarray(X.reshape(2, -1))[:, :10]
    p = np.exp(flat) / np.exp(flat).sum(1, keepdims=True)
    gradient = np.zeros((2, 64))
    gradient[:, :10] = np.eye(10)[LABELS] - p
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
    config = small(digits, **setting(runs, text))
    made, _ = drawer(config)
    cond, null = made.conditioning({}, LABELS.tolist(), contents.negative(config))
    x0 = guide(made.chain, Branches(denoise, cond, null, networks=NETWORKS))(X, LEVEL)
    np.testing.assert_allclose(as_estimate(x0).x0, expected, atol=1e-4)


def test_other_schedules_are_translated(runs):
    """A classifier sees the same example as its own schedule has it."""
    seen = []

    def classify(x, level):
        seen.append((x, level))
        return x.reshape(len(x), -1)[:, :10]

    made, _ = drawer(small(digits, **setting(runs, "classifier(@edm_classifier)")))
    network = made.companions["classifier"].network
    dataclasses.replace(network, make=lambda params: classify)({})(X, LEVEL)
    x, level = seen[0]
    np.testing.assert_allclose([level.alpha, level.sigma], [1.0, 0.75], rtol=1e-5)
    np.testing.assert_allclose(x, X / 0.8, rtol=1e-5)
    made, _ = drawer(small(digits, **setting(runs, "classifier(@classifier)")))
    assert made.companions["classifier"].network.schedule is None


def test_draws_with_everything_at_once(runs):
    """An unconditional model whose classes a classifier knows; memory, PAG, two networks."""
    text = "autoguidance(@unconditional, 2), adaptive_projected(0.5), perturbed_attention(1), "
    text += "classifier(@classifier), interval(high=5), clip()"
    config = small(digits, **setting(runs, text), objective__conditional=False)
    found = described(config)
    assert found.num_classes == 0
    made, _ = drawer(config)
    subjects = made.subjects(4)
    assert subjects == [0, 1, 2, 3] and made.paired
    x = made.draw(parameters(found, 0.3), subjects)
    assert np.isfinite(x).all() and np.abs(x).max() <= 1
    assert np.abs(x[0] - x[1]).max() > 1e-3


MISTAKES = [
    ("cfg(2), rescal(0.7)", r"guidance: unknown 'rescal'.*Did you mean 'rescale'"),
    ("cfg(2), rescale(2)", r"guidance=.*phi must lie in \[0, 1\]"),
    ("cfg('strong')", r"guidance: cfg.scale=.strong.. has the wrong type"),
    ("rescale(0.7), cfg(2)", r"guidance=.*cfg guides the model itself: it stands before rescale"),
    ("instruct(7.5, 1.5)", r"guidance=.*instruct is for networks that edit pictures"),
    ("cfg(2); negative=10", r"config\.samples\.negative=10: there is no class 10; choose 0\.\.9"),
    ("autoguidance(@weak, 2); negative=3", r"autoguidance steers away from.*negative=3 has no"),
    ("autoguidance('/nowhere', 2)", r"autoguidance's run: /nowhere is not the workdir of a run"),
    ("autoguidance(@classifier, 2)", r"autoguidance's run: .* holds a run of a classifier; exp"),
    ("classifier(@weak)", r"classifier's run: .* holds a run of a unet; .*digits_classifier"),
    ("dynamic", r"unknown 'dynamic'; .*Did you mean 'dynamic_threshold'"),
    (
        "cfg(1), perturbed_attention(1, 'attic')",
        r"blocks='attic' names no self-attention of this network; it has mid_block/att",
    ),
    ("cfg(1), perturbed_attention(1, '(')", r"blocks='\(' is no regular"),
]


@pytest.mark.parametrize("text, message", MISTAKES, ids=lambda value: value[:40])
def test_mistakes_are_named(runs, text, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        drawer(small(digits, **setting(runs, text)))
    assert str(error.value).startswith("config.sampl")


def test_what_does_not_fit_the_model_is_named(runs):
    unconditional = dict(objective__conditional=False)
    flow = dict(objective__schedule="rectified_flow", objective__prediction="flow")
    scanned = dict(model__name="dit", model__dit__scan=True)
    for fields, message in [
        (unconditional | {"samples__negative": 1}, r"negative=1: this model knows neither labels"),
        (unconditional | {"samples__labels": (3,)}, r"samples: this model knows neither labels"),
        (unconditional | setting(runs, "autoguidance(@weak, 2)"), "is class-conditional"),
        ({"samples__negative": "red"}, r"samples\.negative='red': there is no class 'red'"),
        ({"samples__prompt": "a cat"}, r"config\.samples: there is no class 'a cat'"),
        ({"samples__prompt": "3", "samples__labels": (3,)}, "give one of the two"),
        ({"samples__labels": 3.5}, "there is no class 3.5"),
        ({"samples__prompt": "@no.txt"}, r"config\.samples\.prompt='@no\.txt': there is no such"),
        (flow | {"sampler__guidance": "cfg(2), rescale(space='eps')"}, "says nothing about x_0"),
        (
            scanned | {"sampler__guidance": "cfg(1), perturbed_attention(1, 'blocks_1')"},
            "it has blocks/attn/",
        ),
        ({"sampler__guidance": 3.0}, r"guidance=3.0: expected texts such as 'cfg\(3.0\)'"),
        (
            {"objective__label_dropout": 0.0},
            r"config\.sampler\.guidance='cfg\(2\), clip\(\)' needs a model that was also trained",
        ),
        (
            dict(sampler__corrector="langevin", sampler__solver="heun"),
            r"config\.sampler\.corrector='langevin': .*one evaluation per step",
        ),
        (
            dict(sampler__corrector="langevin", sampler__solver="ddpm")
            | {"sampler__guidance": "cfg(2), adaptive_projected"},
            r"config\.sampler\.corrector cannot correct with adaptive_projected",
        ),
        (
            dict(sampler__corrector="langevin", sampler__solver="ddim")
            | {"sampler__acceleration": "guidance_cache(every(2))"},
            r"config\.sampler\.corrector cannot correct with config\.sampler\.acceleration",
        ),
        (dict(sampler__corrector="langevin(steps=0)"), r"config\.sampler\.corrector=.*steps >= 1"),
    ]:
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            drawer(small(digits, **fields))
    toy = toy2d.get_config()
    toy.sampler.guidance = "cfg(1), perturbed_attention(1)"
    with pytest.raises(ValueError, match="names no self-attention of this network; it has none"):
        drawer(toy)


def test_settings_without_effect_are_noted():
    def notes(**fields):
        return drawer(small(digits, **fields))[1]

    alone = notes(sampler__guidance="cfg(1), rescale()", samples__negative=3)
    assert "the model alone: rescale, the negative has no effect" in alone[0]
    assert "has no effect without cfg" in notes(sampler__guidance="", samples__negative=3)[0]
    negative = dict(objective__label_dropout=0.0, samples__negative=3)
    assert notes(**negative) == []  # a label to steer away from needs no null class
    assert notes() == []
    assert "the model is unconditional" in notes(objective__conditional=False)[0]


def test_subjects_are_prompts_or_labels_or_lines_of_a_file(tmp_path):
    config = small(digits)
    assert contents.subjects(config) == [] and contents.negative(config) is None
    config.samples.labels = 0
    assert contents.subjects(config) == [0]
    config.samples.labels = (3, 5)
    assert contents.subjects(config) == [3, 5] and drawer(config)[0].subjects(3, [3, 5]) == [
        3,
        5,
        3,
    ]
    (tmp_path / "lines").write_text("a cat\n\n a dog \n")
    config.samples.update(labels=(), prompt=f"@{tmp_path / 'lines'}", negative=0)
    assert contents.subjects(config) == ["a cat", "a dog"] and contents.negative(config) == 0
