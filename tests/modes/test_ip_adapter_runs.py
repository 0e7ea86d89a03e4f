"""Training of an IP-Adapter beside a run with a text encoder of its own, and pictures from it."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_runs
from commands import command
from flax.traverse_util import flatten_dict
from PIL import Image
from tiny_encoders import clip_vision

from diffusion import pipelines
from diffusion.adapters.ip_adapter import ip_adapter
from diffusion.conditioning import Conditioning, ImagePrompt
from diffusion.models.clip import ClipText
from diffusion.models.ip_adapter import ImagePrompted, cross_attentions
from diffusion.models.text_to_image import TextToImage
from diffusion.models.unet import UNet
from diffusion.pipelines import adapter_export
from diffusion.pipelines.generation import Generation
from diffusion.pipelines.request import Request
from diffusion.pretrained.adapters import ip_adapter as files
from diffusion.runs import averages

FIELDS = dict(widths=(8, 16), blocks=1, attention=(0, 1), mid_attention=1, num_heads=2)
NET = UNet(**FIELDS, norm_groups=4)
TEXT = TextToImage(ClipText(20, 12, 1, 2, 16, length=4), NET)
RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 8, 8, 4)).astype(np.float32)
COND = Conditioning(tokens=jnp.array([[3, 19, 0, 0], [5, 7, 19, 0]]))
FEATURES = RNG.standard_normal((2, 6)).astype(np.float32)
PROMPTED = COND.replace(image_prompts=(ImagePrompt(features=FEATURES),))
ADAPTER = "features=6, tokens=2"


@pytest.fixture(scope="module")
def base():
    shapes = jax.eval_shape(lambda: TEXT.init(jax.random.key(0), X, X[:, 0, 0, 0], COND))["params"]
    return jax.tree.map(lambda s: 0.3 * RNG.standard_normal(s.shape).astype(np.float32), shapes)


def run(network, params, cond):
    return jax.jit(network.apply)({"params": params}, X, X[:, 0, 0, 0], cond)


def test_start(base):
    """From the text's keys and values, site by site; with values of zero as the base, and then
    values alone have a gradient."""
    own = ip_adapter("DIR", 6, 2).init(jax.random.key(0), base)
    for i, site in enumerate(cross_attentions(NET)):
        at = base["image"]
        for name in site.path.split("/"):
            at = at[name]
        for name in ("k", "v"):
            copied = own[f"to_{name}_ip_{i}"]["kernel"]
            np.testing.assert_array_equal(copied, at[f"to_{name}"]["kernel"])
    made = ip_adapter("DIR", 6, 2, start="zero")
    network = made.network(TEXT)
    assert isinstance(network.image, ImagePrompted)
    own = made.init(jax.random.key(0), base)
    plain = run(TEXT, base, COND)
    np.testing.assert_array_equal(run(network, made.merge(base, own), COND), plain)
    np.testing.assert_allclose(run(network, made.merge(base, own), PROMPTED), plain, atol=1e-6)

    @jax.jit
    def gradients(own):
        def loss(own):
            params = {"params": made.merge(base, own)}
            return (network.apply(params, X, X[:, 0, 0, 0], PROMPTED) ** 2).mean()

        return jax.grad(loss)(own)

    for name, gradient in flatten_dict(gradients(own), sep="/").items():
        assert (np.abs(gradient).max() > 0) == name.startswith("to_v_ip"), name


def test_written_and_read(base, tmp_path):
    net = NET.clone(context_width=12)
    for kind in ("embedding", "patches"):
        made = ip_adapter("DIR", 6, 2, kind, 64)
        own = made.init(jax.random.key(0), base)
        files.save(tmp_path / "a.safetensors", net, own)
        file = files.open_file(tmp_path / "a.safetensors")
        assert file.feature == made.feature
        projection = made.projection(12)
        assert type(file.projection) is type(projection) and file.projection.tokens == 2
        again = file.load(net)
        jax.tree.map(np.testing.assert_array_equal, own, again)
        model = SimpleNamespace(network=net, scheduler={"_class_name": "DDIMScheduler"})
        left = adapter_export.save(tmp_path, model, None, made, own)
        assert left.read_bytes() == (tmp_path / "a.safetensors").read_bytes()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "patch"}, "Did you mean 'patches'"),
        ({"start": "zeros"}, "Did you mean 'zero'"),
        ({"features": 0}, "features must"),
        ({"tokens": 0}, "tokens must"),
        ({"width": 100}, "multiple of 64"),
    ],
)
def test_mistakes_in_specs(options, message):
    with pytest.raises(ValueError, match=message):
        ip_adapter(**{"encoder": "DIR", "features": 6} | options)


def test_networks_that_it_is_not_for(base):
    with pytest.raises(ValueError, match="width of the context"):
        ip_adapter("DIR", 6).network(NET)
    with pytest.raises(ValueError, match="for U-Nets with cross-attention"):
        ip_adapter("DIR", 6).network(UNet())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of a U-Net, that of its adapter, and a picture."""
    folder = tmp_path_factory.mktemp("runs")
    c = tiny_runs.captioned(folder)
    c.model.name = "unet"
    c.model.unet.update(FIELDS, norm_groups=4)
    tiny_runs.trained(c, folder / "base")
    clip_vision().save_pretrained(folder / "encoder")
    pixels = RNG.integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    Image.fromarray(255 - pixels).save(folder / "b.png")
    options = {
        "model.path": folder / "base",
        "objective.adapter": f"ip_adapter('{folder}/encoder', 24, tokens=2)",
        "data.dir": folder / "pairs.npz",
        "data.size": 8,
        "data.held_out": 0.2,
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.5,
        "optimizer.weight_decay": 0.0,
        "optimizer.warmup": 0,
        "ema": "constant(decay=0.5)",
        "train.steps": 2,
        "train.batch_size": 8,
        "train.sample_every": 0,
        "sampler.steps": 2,
        "sampler.batch_size": 4,
        "samples.columns": 2,
    }
    given = [f"--config.{name}={value}" for name, value in options.items()]
    workdir = f"--workdir={folder / 'run'}"
    error, printed = command(*given, workdir, config="configs/finetune_lora.py")
    assert error is None, printed
    return folder, given


def test_trained_and_drawn(runs):
    folder, _ = runs
    kept, step, _ = averages.parameters(folder / "run", "params", "newest")
    assert step == 2 and set(kept) == {"adapter"} and "projection" in kept["adapter"]
    frozen = pipelines.load(folder / "base")[1]["network"]["image"]
    start = flatten_dict(frozen, sep="/")
    path = "down_blocks_1/attentions_0/transformer_blocks_0/attn2/to_v/kernel"
    assert np.abs(kept["adapter"]["to_v_ip_0"]["kernel"] - start[path]).max() > 1e-5
    spec, found = f"ip_adapter('{folder}/run', image='{folder}/", {}
    for model in ("base", "run"):
        pipeline, params = pipelines.load(folder / model)
        for specs in ("", f"{spec}a.png')", f"{spec}b.png')", f"{spec}a.png', scale=0)"):
            request = Request(steps=2, image_prompts=specs, guidance=("cfg(2)",))
            (made,) = Generation(pipeline, ["red cat"], request).pictures(params)
            found[model, specs] = made[1]
    plain, first, second, off = list(found.values())[:4]
    np.testing.assert_array_equal(off, plain)
    assert np.abs(first - plain).max() > 1e-4 and np.abs(first - second).max() > 1e-5
    for a, b in zip(list(found.values())[4:], (plain, first, second, off)):
        np.testing.assert_allclose(a, b, atol=1e-5)  # the adapter's own run draws the same
    other = UNet(**FIELDS | {"widths": (8, 24)}, norm_groups=4)
    with pytest.raises(ValueError, match=r"run was trained for the network of .*base"):
        pipelines.image_prompts.open_adapter(str(folder / "run"), TextToImage(TEXT.text, other))
    with pytest.raises(ValueError, match="not of an IP-Adapter"):
        pipelines.image_prompts.open_adapter(str(folder / "base"), TEXT)


def test_an_encoder_of_other_features_is_refused(runs):
    folder, given = runs
    adapter = f"--config.objective.adapter=ip_adapter('{folder}/encoder', 25)"
    workdir = f"--workdir={folder / 'other'}"
    error, _ = command(*given, adapter, workdir, config="configs/finetune_lora.py")
    assert "features=25" in error and "gives 24 numbers" in error
