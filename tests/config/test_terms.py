"""config.objective.terms and coupling: what they build, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_encoders

from configs import digits, digits_classifier, toy2d
from diffusion.config import alignment, model, terms
from diffusion.config.data import make_source
from diffusion.config.experiment import build
from diffusion.objectives.couplings import optimal_transport
from diffusion.pipelines import description
from diffusion.pipelines.from_run import Run

NORMAL = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.4, 0.3]}


def small(module=digits, **overrides):
    c = module.get_config()
    c.model.unet.update(widths=(4, 6), norm_groups=2, attention=0, mid_attention=0)
    c.model.dit.update(width=8, depth=3, heads=2)
    for name, value in overrides.items():
        c.update_from_flattened_dict({name.replace("__", "."): value})
    return c


def aligned(encoder, options=""):
    return {"objective__terms": f"alignment(encoder={str(encoder)!r}, hidden=5{options})"}


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of encoders: of transformers' networks, and a classifier's workdir."""
    root = tmp_path_factory.mktemp("encoders")
    tiny_encoders.dinov2(num_hidden_layers=1).save_pretrained(root / "dinov2")
    tiny_encoders.clip_vision(num_hidden_layers=1).save_pretrained(root / "clip")
    tiny_encoders.clip_text(num_hidden_layers=1).save_pretrained(root / "text")
    (root / "dinov2" / "preprocessor_config.json").write_text(json.dumps(NORMAL))
    c = small(digits_classifier)
    data = (make_source(c.data, split) for split in ("train", "test"))
    (root / "classifier").mkdir()
    description.write(root / "classifier", model.describe(c, *data))
    return root


@pytest.fixture
def classifiers_params(monkeypatch):
    def restored(run):
        objective = description.classification(run.description)
        batch = {"x": np.zeros((1, 8, 8, 1), np.float32)}
        shapes = jax.eval_shape(objective.init, jax.random.key(0), batch)
        rng = np.random.default_rng(0)
        return jax.tree.map(lambda s: 0.3 * rng.standard_normal(s.shape, np.float32), shapes), 1

    monkeypatch.setattr(Run, "restored", property(restored))


def test_vision_transformers_see_images_as_they_were_trained_to(encoders):
    images = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 1)), jnp.float32)
    sizes = {"dinov2": (4, 4), "clip": (3, 3)}  # of 8 pixels a patch; CLIP's own 24 / 8
    for name, grid in sizes.items():
        objective = build(small(model__name="dit", **aligned(encoders / name)))
        (term,), params = objective.objective.terms, objective.frozen["alignment"]
        assert (term.block, term.weight, term.stop) == (1, 0.5, None)
        encoder = term.encoder
        assert jax.eval_shape(lambda x, e=encoder, p=params: e(p, x, (4, 4)), images).shape == (
            2,
            *grid,
            32,
        )
        np.testing.assert_allclose(
            encoder.mean, NORMAL["image_mean"] if name == "dinov2" else alignment.CLIP_NORMAL[0]
        )
    # Of one channel as of three, shifted and scaled by the mean and deviation of the file.
    seen, encoder = [], alignment.Patches(None, NORMAL["image_mean"], NORMAL["image_std"])

    class Seen:
        patch, channels, width = 8, 3, 3

        def apply(self, variables, x):
            seen.append(x)
            return jnp.zeros((len(x), 1 + 4, 3))

    object.__setattr__(encoder, "module", Seen())
    encoder({}, images, (2, 2))
    wide = jax.image.resize(images, (2, 16, 16, 1), "cubic")
    np.testing.assert_allclose(
        np.asarray(seen[0]) * NORMAL["image_std"] + NORMAL["image_mean"],
        np.broadcast_to((wide + 1) / 2, (2, 16, 16, 3)),
        atol=1e-5,
    )


def test_a_classifier_gives_the_features_in_its_middle(encoders, classifiers_params):
    config = small(**aligned(encoders / "classifier", ", stop=7"))
    experiment = build(config)
    (term,) = experiment.objective.terms
    assert (term.block, term.stop, term.projector.features) == (3, 7, 6)
    shapes = jax.eval_shape(
        experiment.objective.init, jax.random.key(0), {"x": np.zeros((1, 8, 8, 1), np.float32)}
        | {"label": np.zeros(1, np.int32)},
    )  # fmt: skip
    assert shapes["alignment"]["Dense_2"]["kernel"].shape == (5, 6)
    # The pipeline has nothing of it.
    trained = {"network": {"w": 1}, "alignment": {"w": 2}}
    assert experiment.params(trained) == {"network": {"w": 1}}


def test_latents_have_their_images_beside_them(encoders):
    config = small(**aligned(encoders / "dinov2"))
    plain = build(small())
    source = plain.train
    config.data.autoencoder = "somewhere"
    _, train, _ = terms.attach(config, plain.objective, source)
    batch = train.read(np.array([3, 5]))
    np.testing.assert_array_equal(batch["clean"], source.read(np.array([3, 5]))["x"])
    assert set(batch) == {"x", "label", "clean"}


@pytest.mark.parametrize(
    "fields, message",
    [
        (aligned("nowhere"), r"config\.objective\.terms=.*there is no folder 'nowhere'"),
        (aligned("@text"), r"config\.objective\.terms=.*a ClipText is no encoder"),
        (
            aligned("@dinov2", ", block=4"),
            r"config\.objective\.terms=.*block=4.*the blocks 1\.\.3",
        ),
        (
            aligned("@dinov2") | dict(objective__name="classification"),
            r"config\.objective\.terms=.*change the loss of config\.objective\.name='denoising'",
        ),
        (aligned("@dinov2", ", weight=-1.0"), r"weight=-1\.0 must be a finite number >= 0"),
        (
            dict(objective__terms="uncertainty()", objective__name="autoencoding"),
            r"change the loss of .*'denoising', not of 'autoencoding'",
        ),
        (dict(objective__terms="alignment(weight=1.0)"), r"alignment needs encoder"),
        (dict(objective__terms=("uncertain()",)), r"terms: unknown 'uncertain'.*'uncertainty'"),
        (dict(objective__terms=("uncertainty()",) * 2), r"two terms uncertainty"),
        (dict(objective__terms=3), r"config\.objective\.terms=3: expected texts such as"),
        (
            dict(objective__noise="gaussian(offset=-0.1)"),
            r"config\.objective\.noise=.*offset must lie in \[0, 100\]",
        ),
        (dict(objective__coupling="optimal"), r"config\.objective\.coupling: unknown 'optimal'"),
        (
            dict(objective__coupling="optimal_transport(group=5)"),
            r"config\.objective\.coupling=.*group=5 does not divide the 16 .*nearest: 4 or 8",
        ),
        (
            dict(
                objective__coupling="optimal_transport(same_label=True)",
                objective__conditional=False,
            ),
            r"config\.objective\.coupling=.*same_label=True needs labels",
        ),
        (dict(objective__coupling="nearest(k=0)"), r"coupling='nearest\(k=0\)': k must lie"),
        (
            dict(
                objective__coupling="nearest",
                objective__terms="variational_bound()",
                objective__times="discrete",
            ),
            r"config\.objective\.coupling='nearest': the variational_bound",
        ),
    ],
)
def test_mistakes_are_named(encoders, fields, message):
    fields = {k: v.replace("@", f"{encoders}/") if "@" in str(v) else v for k, v in fields.items()}
    with pytest.raises(ValueError, match=message):
        build(small(**fields))


def test_points_have_nothing_to_align(encoders):
    with pytest.raises(ValueError, match=r"terms=.*of the tokens of a unet"):
        build(small(toy2d, **aligned(encoders / "dinov2")))


def test_couplings_are_within_a_devices_share():
    experiment = build(
        small(
            objective__coupling="optimal_transport",
            train__accumulate=2,
            sampler__solver="ddpm",
        )
    )
    coupling = experiment.objective.coupling
    assert (coupling.func, coupling.keywords) == (optimal_transport, {"group": 64 // 8})
    assert any("draws noise" in note for note in experiment.notes)
    assert not any("draws noise" in n for n in build(small(sampler__solver="ddpm")).notes)
