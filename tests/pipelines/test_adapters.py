"""Adapters by spec: strengths of components and blocks, on pipelines and runs, in every mode."""

import jax
import numpy as np
import pytest
import tiny_pipelines as tiny
from adapter_cases import UNET, chosen, factors, lora, place, random, tiny_models
from safetensors.numpy import save_file
from tiny_tokenizer import tiny_tokenizer

from configs import base as config_base
from diffusion.adapters.low_rank.deltas import LowRank
from diffusion.adapters.low_rank.merge import merge
from diffusion.conditioning import Conditioning
from diffusion.config import drawing, effects
from diffusion.evaluation.figures import to_uint8
from diffusion.models.clip import ClipText
from diffusion.models.dit import DiT
from diffusion.models.text_to_image import TextToImage
from diffusion.modes import generate as mode
from diffusion.objectives.adapting import OWN
from diffusion.pipelines import (
    adapted,
    adapters,
    description,
    generate,
    load,
    memory,
    open_any,
    tasks,
)  # fmt: skip
from diffusion.pipelines.adapters import attach, parse
from diffusion.pipelines.draw import draw
from diffusion.pipelines.from_run import open_run
from diffusion.pipelines.from_single_file import open_checkpoint, save_checkpoint
from diffusion.pipelines.strengths import Strengths
from diffusion.pretrained.adapters import layers, reading, writing
from diffusion.pretrained.schedulers import from_diffusers
from diffusion.runs import averages
from diffusion.sampling.guidance.links import cfg
from diffusion.sampling.sample import image_keys, sample

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
)
PROMPT = "a photo of a cat"


@pytest.fixture(scope="module")
def models():
    return tiny_models()


@pytest.fixture(scope="module")
def file(models, tmp_path_factory):
    """Of changes of the U-Net and the text encoder."""
    path = tmp_path_factory.mktemp("adapters") / "style.v2 (1).safetensors"
    save_file({k: v / 4 for k, v in both(models["sd"]).items()}, path)
    return str(path)


def both(model):
    return lora(model, ranks=(1, 3)) | lora(model, "text, kohya")


def table(model):
    return adapters._table(model.opened.pipeline, model.opened.shapes)


def assert_trees_equal(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_specs(file):
    assert parse("a/b.c/style.v2.safetensors(0.8)") == (
        "a/b.c/style.v2.safetensors",
        Strengths(0.8),
    )
    assert parse("runs/lora") == ("runs/lora", Strengths())
    assert parse(" owner/name(network=0.5, text=0) ") == ("owner/name", Strengths(1, 0.5, 0))
    blocks = Strengths(up=(1, (0, 0.5)), mid=0.2)
    assert parse("x(up=(1, (0, 0.5)), mid=0.2)") == ("x", blocks)
    assert parse(file) == (file, Strengths())
    assert parse(file + "(-0.5)") == (file, Strengths(-0.5))
    for text, message in (
        ("x(networ=1)", "no option 'networ'; its options: strength, network, text"),
        ("x(text='high')", "wrong type"),
        ("x(1, 2)", "too many positional"),
        ("x(nope)", "unknown 'nope'"),
        ("x(inf)", "strength must be a finite number"),
        ("", "expected a text such as"),
    ):
        with pytest.raises(ValueError, match=message):
            parse(text)


def test_strengths_of_components_and_blocks(models, file):
    model = models["sd"]
    deltas = reading.read(reading.find(file), table(model)).deltas

    def strengths(text):
        return parse(f"x({text})")[1].by_path(deltas, table(model))

    def at(text, module, component="unet"):
        return strengths(text)[place(model, component, module)[0]]

    names = list(UNET)
    down, query, mid, second, feed, conv1, _, shortcut, downsampler, upsampler, time, out = names
    text = "text_model.encoder.layers.1.mlp.fc1"
    assert {at("0.5", name) for name in names} == {0.5}
    assert at("0.5", text, "text_encoder") == 0.5
    assert at("0.5, network=2", down) == 2
    assert at("0.5, network=2", text, "text_encoder") == 0.5
    blocks = "2, down=((0.1,), 0.2), mid=0.3, up=(0.4, (0.5, 0.6))"
    expected = {down: 0.1, query: 0.1, downsampler: 0.1, conv1: 0.2, shortcut: 0.2, mid: 0.3}
    expected |= {upsampler: 0.4, second: 0.6, feed: 0.6, time: 1, out: 1}
    for name, factor in expected.items():
        np.testing.assert_allclose(at(blocks, name), 2 * factor, err_msg=name)
    assert at(blocks, text, "text_encoder") == 2
    for options, message in (
        ("text_2=1", "text_2=1 has no effect: the adapter changes network, text alone"),
        ("up=(1, 1, 1)", r"has 3 entries; the model has 2 such blocks"),
        ("up=(1, (1, 1, 1))", r"has 3 entries; block 1 has 2 ResNet blocks"),
    ):
        with pytest.raises(ValueError, match=message):
            strengths(options)


def test_strength_zero_and_the_base_stay_to_the_bit(models, file):
    opened = models["sd"].opened
    base = opened.load()
    before = jax.tree.map(np.array, base)
    assert_trees_equal(attach(opened, f"{file}(0)").load(), base)
    changed = attach(opened, file).load()
    differing = jax.tree.leaves(jax.tree.map(lambda a, b: (a != b).any(), changed, base))
    assert 0 < sum(differing) < len(differing)
    assert_trees_equal(base, before)
    assert attach(opened, ()) is opened
    # One after another is both at once; a negative one takes away what was added.
    twice = attach(attach(opened, file), f"{file}(-1)").load()
    once = attach(opened, (file, f"{file}(-1)")).load()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), twice, base)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), once, base)


def test_errors_name_the_field_and_come_before_weights(models, file, tmp_path, monkeypatch):
    monkeypatch.setattr(type(models["sd"].opened), "load", None)
    for given, kind, message in (
        ("nowhere.safetensors", FileNotFoundError, r"x='nowhere.safetensors': no such file or f"),
        (f"{file}(text_2=1)", ValueError, r"^x='.*text_2=1 has no effect"),
        (str(tmp_path), FileNotFoundError, "holds no .safetensors file"),
        (0.8, ValueError, "expected a text such as 'style.safetensors"),
    ):
        with pytest.raises(kind, match=message):
            attach(models["sd"].opened, given, "x")
    for name in ("a", "b"):
        save_file(lora(models["sd"]), tmp_path / f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"several files; name one of them: a\.safetensors, b"):
        attach(models["sd"].opened, str(tmp_path), "x")
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "lora.bin").write_bytes(b"PK")
    with pytest.raises(ValueError, match="unpickling"):
        attach(models["sd"].opened, str(tmp_path / "p"), "x")


def test_two_adapters_with_block_scales_as_in_diffusers(models, tmp_path):
    pytest.importorskip("peft")
    import torch

    model, theirs = models["xl"], models["xl"].theirs
    for name, seed in (("a", 0), ("b", 1)):
        modules = {m: s for m, s in chosen("peft", model).items() if "transformer" in m}
        tensors = {}
        for module, (down, up) in factors(modules, (2,), seed=seed).items():
            tensors[f"unet.{module}.lora_A.weight"] = down / 4
            tensors[f"unet.{module}.lora_B.weight"] = up / 4
        save_file(tensors, tmp_path / f"{name}.safetensors")
        theirs.load_lora_weights(tmp_path, weight_name=f"{name}.safetensors", adapter_name=name)
    scales = {"down": {"block_0": [0.5]}, "mid": 0.3, "up": {"block_1": [1.0, 0.2]}}
    theirs.set_adapters(["a", "b"], [0.8, {"unet": scales}])
    given = (f"{tmp_path}/a.safetensors(0.8)", f"{tmp_path}/b.safetensors")
    given = (given[0], f"{given[1]}(down=((0.5,), 1), mid=0.3, up=(1, (1, 0.2)))")
    pipeline, params = load(model.folder, adapters=given)
    noise = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    options = {"guidance_scale": 3.0, "num_inference_steps": 3, "output_type": "np"}
    size = {"height": tiny.SIZE, "width": tiny.SIZE}
    try:
        with torch.no_grad():
            expected = theirs(PROMPT, latents=tiny.torch_image(noise), **size, **options).images
    finally:
        theirs.unload_lora_weights()
    cond, null = pipeline.conditioner(params, [PROMPT])
    cond, null = (tasks.micro_conditioning(c, (16, 16)) for c in (cond, null))
    sampler = from_diffusers(pipeline.scheduler, 3)
    inputs = tasks.new(pipeline, cond, null, size=(16, 16))
    inputs = inputs._replace(x_init=noise * sampler.solver.init)
    x = draw(pipeline, params, sampler, image_keys(0, [0]), inputs, (cfg(3.0),))
    images = np.asarray(pipeline.codec.decode(params, x, [0]))
    np.testing.assert_allclose(images, tiny.numpy_image(expected), atol=1e-3)
    x = draw(pipeline, model.opened.load(), sampler, image_keys(0, [0]), inputs, (cfg(3.0),))
    assert np.abs(np.asarray(pipeline.codec.decode(params, x, [0])) - images).max() > 1e-2


def test_strengths_are_traced(models, file):
    """Another strength compiles nothing; a grid by vmap is the pictures one by one."""
    model = models["sd"]
    pipeline, params = model.opened.pipeline, model.opened.load()
    options = {"steps": 2, "size": (16, 16), "seed": 3, "guidance": 1.0}
    adapters.at_strengths(pipeline, params, file, [0.2], PROMPT, **options)
    compiled.clear()
    strengths = [0.0, 0.5, -1.5]
    made = adapters.at_strengths(pipeline, params, file, strengths, PROMPT, **options)
    assert not compiled
    plain = generate(pipeline, params, PROMPT, **options)[0]
    plain, *pictures = (np.asarray(picture, np.int32) for picture in (plain, *made))
    np.testing.assert_array_equal(plain, pictures[0])
    assert np.abs(pictures[1] - pictures[2]).max() > 3

    deltas = reading.read(reading.find(file), table(model)).deltas
    solver = from_diffusers(pipeline.scheduler, 2).solver

    def draw(strength):
        weights = merge(params, [(deltas, strength)])
        cond, _ = pipeline.conditioner(weights, [PROMPT])
        denoise = pipeline.denoiser(weights)
        keys = image_keys(3, [0])
        return sample(lambda x, level: denoise(x, level, cond), solver, keys, pipeline.shape)

    rows = jax.jit(jax.vmap(draw))(np.array(strengths, np.float32))
    for row, picture in zip(rows, pictures):
        decoded = to_uint8(np.asarray(pipeline.codec.decode(params, row, [0]))[0])
        assert np.abs(decoded - picture).max() <= 1


def test_config_adapters(models, file, tmp_path, monkeypatch):
    """It is part of what samples depend on, and of pictures' text; it is refused in training."""
    monkeypatch.setattr(memory, "available", lambda device: None)
    c = config_base.get_config()
    c.model.path, c.samples.prompt = str(models["sd"].folder), PROMPT
    pipeline = models["sd"].opened.pipeline
    plain = drawing.settings(c, pipeline, 0)
    c.adapters = (f"{file}(0.5)",)
    assert drawing.settings(c, pipeline, 0) == plain | {"adapters": [f"{file}(0.5)"]}
    source, _, made = mode.checked(c)
    assert len(source.attached) == 1
    assert mode._about(c, made, PROMPT, 0)["adapters"] == f"{file}(0.5)"
    assert len(drawing.opened(c, str(tmp_path)).opened.attached) == 1
    c.adapters = f"{file}(text_2=1)"
    for opening in (mode.checked, lambda c: drawing.opened(c, str(tmp_path))):
        with pytest.raises(ValueError, match=r"^config\.adapters='.*text_2=1 has no effect"):
            opening(c)
    with pytest.raises(ValueError, match=r"config\.adapters has no effect in --mode=train"):
        effects.check("train", ["adapters"])
    effects.check("sweep", ["adapters"])


def test_on_a_single_file(models, file, tmp_path):
    model = models["sd"]
    params = model.opened.load()
    save_checkpoint(tmp_path / "one.safetensors", "v1", model.opened.pipeline, params)
    modules = {name: part.module for name, part in model.opened.models.items()}
    opened = open_checkpoint(
        tmp_path / "one.safetensors", lambda pad: tiny_tokenizer(pad=pad), modules=modules
    )
    assert_trees_equal(attach(opened, file).load(), attach(model.opened, file).load())


def described(tmp_path, monkeypatch, network, params, **fields):
    """The workdir of a run with these parameters."""
    d = description.Description(
        network, fields, "cosine", "v", "auto", (8, 8, 1), num_classes=3 * (network == "unet")
    )
    description.write(tmp_path, d)
    monkeypatch.setattr(averages, "parameters", lambda *_: (params, 2, "averaged"))
    return tmp_path


def test_on_a_run(tmp_path, monkeypatch):
    """A U-Net of labels is adapted like a published one; what diffusers calls its layers counts."""
    fields = {"widths": (8, 16), "norm_groups": 4, "attention": (0, "self")}
    described(tmp_path, monkeypatch, "unet", None, **fields)
    pipeline = open_run(tmp_path).pipeline
    inputs = np.zeros((1, 8, 8, 1)), np.zeros(1), pipeline.conditioner({}, [0])[0]
    shapes = jax.eval_shape(pipeline.network.init, jax.random.key(0), *inputs)["params"]
    params = jax.tree.map(lambda s: random(*s.shape), shapes)
    described(tmp_path, monkeypatch, "unet", {"network": params}, **fields)
    down, up = (np.random.default_rng(0).normal(size=s) for s in ((2, 16), (16, 2)))
    names = ("unet.mid_block.attentions.0.to_q", "lora_unet_mid_block_attentions_0_to_k")
    tensors = {f"{names[0]}.lora_A.weight": down, f"{names[0]}.lora_B.weight": up}
    tensors |= {f"{names[1]}.lora_down.weight": down, f"{names[1]}.lora_up.weight": up}
    save_file({k: v.astype(np.float32) for k, v in tensors.items()}, tmp_path / "x.safetensors")
    opened = open_any(tmp_path, adapters=f"{tmp_path}/x.safetensors(0.5)")
    made, before = opened.load()["network"], params["mid_block"]["attentions_0"]
    for name in ("to_q", "to_k"):
        kernel = made["mid_block"]["attentions_0"][name]["kernel"]
        np.testing.assert_allclose(kernel, before[name]["kernel"] + 0.5 * (up @ down).T, atol=1e-5)
    with pytest.raises(ValueError, match=r"trained a whole model: it is for model\.path"):
        open_any(tmp_path, adapters=str(tmp_path))


def test_a_network_of_this_project_and_its_text_encoder(tmp_path):
    """What no other software has is named after our paths; its text encoder is CLIP's."""
    net = TextToImage(
        text=ClipText(vocab_size=20, width=16, depth=1, heads=2, hidden=32, length=6),
        image=DiT(width=16, depth=1, heads=2, patch=4, num_classes=0, cross_attention=True),
    )
    cond = Conditioning(tokens=np.zeros((1, 6), int), context_mask=np.ones((1, 6), bool))
    inputs = np.zeros((1, 8, 8, 2)), np.zeros(1), cond
    shapes = jax.eval_shape(net.init, jax.random.key(0), *inputs)["params"]
    made = layers.table(net, (), {"network": shapes})
    one = np.ones((), np.float32)
    paths = {
        "network.image.blocks_0.attn.qkv": "network/image/blocks_0/attn/qkv/kernel",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1": (
            "network/text/encoder/layers_0/mlp/fc1/kernel"
        ),
    }
    deltas = {}
    for name, path in paths.items():
        out, width = made.aliases[name].shapes["weight"]
        deltas[path] = LowRank(random(2, width), random(out, 2), one)
    for naming in ("peft", "kohya"):
        writing.write(tmp_path / "x.safetensors", deltas, made, naming=naming)
        read = reading.read(tmp_path / "x.safetensors", made).deltas
        jax.tree.map(np.testing.assert_array_equal, read, deltas)
    with pytest.raises(ValueError, match=r"up=0\.5 has no effect: the model has no such blocks"):
        Strengths(up=0.5).by_path(deltas, made)
    assert set(Strengths(text=0.5).by_path(deltas, made).values()) == {0.5, 1}


def test_a_run_as_an_adapter(models, tmp_path, monkeypatch):
    """Its checkpoint holds the adapter alone; inside it the encoders lie within the network."""
    model = models["sd"]
    query = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    found = [model.table.aliases[f"unet.{query}"]]
    found += [model.table.aliases["text_encoder.text_model.encoder.layers.0.mlp.fc1"]]
    inside = [layer.paths["weight"] for layer in found]
    inside[0] = inside[0].replace("network/", "image/", 1)
    inside[1] = inside[1].replace("encoders/0/", "text/encoders_0/", 1)
    trained = {}
    for path, layer in zip(inside, found):
        out, width = layer.shapes["weight"]
        trained[path] = {"down": np.ones((1, width)), "up": np.ones((out, 1))}

    class Stub:
        def deltas(self, params):
            return {p: LowRank(d["down"], d["up"], np.float32(1)) for p, d in params.items()}

    monkeypatch.setitem(adapted.CHOICES, "stub", lambda: Stub())
    fields = {"path": str(model.folder), "adapter": "stub"}
    fields["base"] = adapted.fingerprint(str(model.folder))
    described(tmp_path, monkeypatch, "adapted", {OWN: trained}, **fields)
    made = attach(model.opened, f"{tmp_path}(0.5, text=2)").load()
    base = model.opened.load()
    differing = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), made, base)
    changed = [number for number in jax.tree.leaves(differing) if number]
    np.testing.assert_allclose(sorted(changed), [0.5, 2], rtol=1e-5)
    with pytest.raises(ValueError, match=r"made for .* 32 numbers.*this model .* 64 numbers"):
        attach(models["xl"].opened, str(tmp_path))
