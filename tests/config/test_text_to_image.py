"""Text to image in latent space from scratch: train, judge, draw, as a user does."""

import json

import jax
import numpy as np
import pytest
from commands import newest
from PIL import Image
from tiny_tokenizer import tiny_tokenizer

from configs import emoji_text_to_image
from diffusion import pretrained
from diffusion.conditioning import from_batch, null_like
from diffusion.config import contents, latents
from diffusion.config.data import make_images
from diffusion.config.experiment import build
from diffusion.denoiser import as_estimate
from diffusion.levels import NoiseLevel
from diffusion.models.autoencoder import AutoencoderKL
from diffusion.modes import sample, train
from diffusion.objectives.dropout import together
from diffusion.pretrained.models import shapes
from diffusion.sampling.guidance.chain import Branches, guide

COLOURS, THINGS = ("red", "blue", "black", "green"), ("cat", "house", "sea", "river")
CAPTIONS = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Of a tiny run, with an autoencoder of random parameters and its cache."""
    folder = tmp_path_factory.mktemp("text_to_image")
    rng = np.random.default_rng(0)
    net = AutoencoderKL(
        widths=(8, 8), blocks=1, latent_channels=2, mid_attention=False, norm_groups=4
    )
    params = jax.tree.map(lambda s: rng.normal(0, 0.2, s.shape).astype(np.float32), shapes(net))
    pretrained.save(folder / "autoencoder", net, params)
    images = rng.integers(0, 256, (32, 8, 8, 4), np.uint8)
    np.savez(folder / "pairs.npz", images=images, caption=np.array(2 * CAPTIONS))
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    c = emoji_text_to_image.get_config()
    c.data.update(name="captioned", dir=str(folder / "pairs.npz"), size=8, held_out=0.2)
    c.data.tokenizer = str(folder / "tokenizer")
    c.data.autoencoder, c.data.cache = str(folder / "autoencoder"), str(folder / "cache")
    c.model.name = "dit"
    c.model.dit.update(width=16, depth=1, heads=2, patch=4, cross_attention=True, pooled=True)
    c.model.text.update(width=16, depth=1, heads=2)
    c.optimizer.update(name="sgd", warmup=0, clip_norm=0.0)  # quick to compile
    c.train.update(steps=2, batch_size=8, log_every=1, sample_every=0)
    c.sampler.update(steps=2, batch_size=8)
    c.samples.update(columns=2, count=4)
    c.evaluation.count = 4
    latents.compute(c.data, lambda split: make_images(c.data, split))
    return c


def test_a_run_leaves_pictures_of_held_out_captions(config, tmp_path):
    train.run(config, str(tmp_path))
    for name in ("samples.png", "trajectory.png", "loss.png"):
        assert (tmp_path / name).stat().st_size > 0
    judged = json.loads((tmp_path / "evaluation.json").read_text())
    held_out = judged["retrieval_captions"]
    assert 2 <= held_out <= 4 and judged["captions_count"] == 2 * held_out

    c = config.copy_and_resolve_references()
    with c.ignore_type():
        c.samples.update(prompt=("a red cat", "blue sea"), negative="black")
    sample.run(c, str(tmp_path))
    drawn = np.load(newest(tmp_path / "samples") / "samples.npz")
    assert drawn["x"].shape == (4, 4, 4, 2) and drawn["image"].shape == (4, 8, 8, 3)
    assert drawn["caption"].tolist() == 2 * ["a red cat", "blue sea"]
    # What is shown is the decoded latents.
    codec, params = latents.codec(c.data.autoencoder)
    decoded = np.asarray(codec.decode(params, drawn["x"]))
    np.testing.assert_allclose(drawn["image"], decoded.clip(-1, 1), atol=1e-5)
    image = Image.open(newest(tmp_path / "samples") / "pictures" / "000001.png")
    assert image.size == (8, 8) and image.text["caption"] == "blue sea"
    assert image.text["negative"] == "black"


def test_guidance_steers_from_the_negative_or_the_empty_caption(config):
    """Of a network that echoes its first tokens, the guided estimate is known."""
    c = config.copy_and_resolve_references()
    c.sampler.guidance = "cfg(3.0)"

    def echo(x, level, cond):
        return x * 0 + cond.tokens[:, 1:3].mean(1)[:, None, None, None]

    def guided(negative, caption="red cat"):
        c.samples.negative = negative
        experiment = build(c)
        encode, drawer = experiment.train.encode, experiment.drawer
        cond, null = drawer.conditioning({}, [caption], contents.negative(c))
        level = NoiseLevel(*np.float32([0.5, 0.5, 0.5]))
        x = np.ones((1, 4, 4, 2), np.float32)
        value = as_estimate(guide(drawer.chain, Branches(echo, cond, null))(x, level)).x0.mean()
        own, bad = (float(encode([t])["tokens"][0, 1:3].mean()) for t in (caption, negative))
        return float(value), bad + 3 * (own - bad)

    for negative in ("", "blue sea"):
        value, expected = guided(negative)
        assert value == pytest.approx(expected, rel=1e-5)
    assert guided("")[0] != guided("blue sea")[0]


def test_dropped_captions_are_the_empty_caption(config):
    experiment = build(config)
    encode = experiment.train.encode
    null = experiment.objective.null(from_batch(encode(["red cat", "blue sea"])))
    empty = encode(["", ""])
    np.testing.assert_array_equal(null.tokens, empty["tokens"])
    np.testing.assert_array_equal(null.context_mask, empty["context_mask"])
    assert experiment.objective.dropout.func is together
    assert experiment.objective.dropout.keywords == {"rate": config.objective.label_dropout}
    assert null_like(null).tokens is null.tokens


def test_captions_are_drawn_in_turn_and_held_out_by_default(config):
    experiment = build(config)
    drawer = experiment.drawer
    held_out = set(experiment.held_out.captions)
    suggested = list(drawer.pipeline.conditioner.suggestions)
    count = len(suggested)
    assert set(suggested) == held_out and count == len(held_out)
    subjects = drawer.subjects(count + 2)
    assert subjects == [*suggested, *suggested[:2]]
    cond, _ = drawer.conditioning({}, subjects)
    np.testing.assert_array_equal(cond.tokens[0], cond.tokens[count])
    assert (cond.tokens[0] != cond.tokens[1]).any()


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("objective.label_dropout", 0.0, r"cfg\(3\.0\)' needs a model that was also trained"),
        (
            "samples.negative",
            0,
            r"config\.samples\.negative=0: the model takes captions",
        ),
        ("data.flip", True, r"config\.data\.flip=True: latents of a mirrored image"),
        ("data.autoencoder", "nowhere", r"config\.data\.autoencoder='nowhere': there is no folder"),
        ("model.text.heads", 5, r"config\.model\.text: .*heads"),
    ],
)
def test_what_does_not_fit_is_named(config, field, value, message):
    c = config.copy_and_resolve_references()
    with c.ignore_type():
        c.update_from_flattened_dict({field: value})
    with pytest.raises(ValueError, match=message):
        build(c)


def test_a_negative_caption_needs_captions(config):
    c = config.copy_and_resolve_references()
    c.objective.conditional = False
    c.model.dit.update(cross_attention=False, pooled=False)
    c.samples.negative = "red"
    with pytest.raises(ValueError, match=r"negative='red': this model knows neither labels"):
        build(c)
