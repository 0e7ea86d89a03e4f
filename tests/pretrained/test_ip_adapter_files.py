"""Files of IP-Adapters: published sizes, diffusers' numbers, round trips, and what is refused."""

import math

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_ip_adapters as tiny_ip
import tiny_pipelines as tiny
import torch
from safetensors.torch import load_file, save_file

from diffusion.conditioning import Conditioning, ImagePrompt
from diffusion.models.image_tokens import EmbeddingTokens, Resampler
from diffusion.models.ip_adapter import ImagePrompted
from diffusion.models.unet import sd15, sdxl
from diffusion.pretrained import names
from diffusion.pretrained.adapters import ip_adapter
from diffusion.pretrained.networks import unet

SD, XL = sd15(context_width=768), sdxl(context_width=2048)
RNG = np.random.default_rng(0)


@pytest.mark.parametrize(
    "net, projection, feature, count",
    [
        (SD, EmbeddingTokens(4, 768), (1024,), 22_319_616),
        (SD, EmbeddingTokens(4, 768), (1280,), 23_106_048),
        (XL, EmbeddingTokens(4, 2048), (1024,), 349_188_096),
        (XL, EmbeddingTokens(4, 2048), (1280,), 351_285_248),
        (SD, Resampler(16, 768, 768, 12), (257, 1280), 49_087_488),
        (XL, Resampler(16, 2048, 1280, 20), (257, 1280), 423_748_864),
    ],
)
def test_published_counts(net, projection, feature, count):
    features = jax.ShapeDtypeStruct((1, *feature), jnp.float32)
    shapes = ip_adapter.own_shapes(net, projection, features)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(their tiny U-Net, ours, our parameters, folder of one file of each kind)."""
    theirs, folder = tiny.unet(), tmp_path_factory.mktemp("files")
    for seed, kind in enumerate(tiny_ip.KINDS):
        save_file(tiny_ip.adapter(theirs, kind, seed), folder / f"{kind}.safetensors")
    config = {**theirs.config, "_class_name": "UNet2DConditionModel"}
    ours = unet.from_config(config)
    shapes = jax.eval_shape(ours.init, jax.random.key(0), *unet.example(ours))["params"]
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    return theirs, ours, names.from_tensors(unet.names(ours), shapes, state), folder


def opened(made, kind):
    return ip_adapter.open_file(made[3] / f"{kind}.safetensors")


def test_networks_are_diffusers(made):
    """All four kinds at once around one U-Net, at scales of their own; FaceID without its LoRA."""
    theirs, net, params, folder = made
    width, scales = theirs.config.cross_attention_dim, (0.9, 0.4, 1.2, 0.7)
    features = [(2, 1, 24), (2, 1, 10, 32), (2, 1, 10, 32), (2, 1, 20)]
    features = [RNG.standard_normal(shape).astype(np.float32) for shape in features]
    x = RNG.standard_normal((2, 8, 8, 4)).astype(np.float32)
    context = RNG.standard_normal((2, 5, width)).astype(np.float32)
    states, prompts, network = [], [], net
    for kind, scale, given in zip(tiny_ip.KINDS, scales, features):
        state = {"image_proj": {}, "ip_adapter": {}}
        for key, value in load_file(folder / f"{kind}.safetensors").items():
            part, rest = key.split(".", 1)
            state[part][rest] = value
        states.append(state)
        file = opened(made, kind)
        file.check(net)
        network = ImagePrompted(network, file.projection)
        params = {"network": params, **file.load(net)}
        full = np.full((2, 1), scale, np.float32)
        prompts.append(ImagePrompt(features=given[:, 0], scale=full))
    theirs._load_ip_adapter_weights(states)
    for processor in theirs.attn_processors.values():
        if hasattr(processor, "scale"):
            processor.scale = list(scales)
    torches = [torch.from_numpy(a) for a in (x.transpose(0, 3, 1, 2), context)]
    more = {"image_embeds": [torch.from_numpy(f) for f in features]}
    with torch.no_grad():
        expected = theirs(
            torches[0], torch.tensor([3, 700]), torches[1], added_cond_kwargs=more
        ).sample
    cond = Conditioning(context=context, image_prompts=tuple(prompts))
    run = jax.jit(lambda params, cond: network.apply({"params": params}, x, time, cond))
    time = np.array([3.0, 700.0], np.float32)
    ours = run(params, cond)
    np.testing.assert_allclose(ours, expected.numpy().transpose(0, 2, 3, 1), atol=1e-4)
    off = run(params, cond.replace(image_prompts=()))
    assert np.abs(ours - off).max() > 0.1


@pytest.mark.parametrize("kind", tiny_ip.KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_round_trip_to_the_bit(made, kind, dtype, tmp_path):
    path = made[3] / f"{kind}.safetensors"
    given = {key: value.to(dtype) for key, value in load_file(path).items()}
    save_file(given, tmp_path / "a.safetensors")
    file = ip_adapter.open_file(tmp_path / "a.safetensors")
    params = file.load(made[1])
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    base = {"network": made[2], **params}  # what else there is is not written
    numpy = jnp.float16 if dtype is torch.float16 else None
    ip_adapter.save(tmp_path / "b.safetensors", made[1], base, numpy)
    again = load_file(tmp_path / "b.safetensors")
    assert again.keys() == {key for key in given if "lora" not in key}
    for key, value in again.items():
        assert value.dtype == dtype and torch.equal(value, given[key]), key


def test_lora_of_faces(made):
    """dW = B A of every attention, those to themselves as well; by hand for one."""
    file, net = opened(made, "face"), made[1]
    deltas = file.lora(net)
    flat = flax.traverse_util.flatten_dict(made[2], sep="/")
    kernels = {p for p in flat if "/attn" in p and p.endswith("kernel")}
    assert deltas.keys() == kernels and file.has_lora and file.face
    state = load_file(made[3] / "face.safetensors")
    at = "down_blocks_0/attentions_0/transformer_blocks_0/attn1/to_out_0/kernel"
    down, up = (state[f"ip_adapter.0.to_out_lora.{p}.weight"].numpy() for p in ("down", "up"))
    np.testing.assert_array_equal(deltas[at].up @ deltas[at].down, jnp.asarray(up) @ down)
    assert opened(made, "base").lora(net) == {} and not opened(made, "base").has_lora


def changed(made, tmp_path, kind, change):
    state = load_file(made[3] / f"{kind}.safetensors")
    change(state)
    path = tmp_path / "changed.safetensors"
    save_file({key: value.contiguous() for key, value in state.items()}, path)
    return path


@pytest.mark.parametrize(
    "kind, change, message",
    [
        ("base", lambda s: s.pop("image_proj.norm.bias"), r"1 missing: image_proj\.norm\.bias"),
        ("plus", lambda s: s.update(other=torch.ones(2)), "1 unexpected: other"),
        ("base", lambda s: s.pop("ip_adapter.1.to_v_ip.weight"), "missing: ip_adapter.1.to_v_ip"),
        (
            "full",
            lambda s: s.update({"image_proj.proj.0.bias": torch.ones(3)}),
            r"1 misshapen: image_proj\.proj\.0\.bias \(3,\), expected \(32,\)",
        ),
        ("face", lambda s: s.pop("ip_adapter.0.to_q_lora.up.weight"), "q_lora.up.* is missing"),
        (
            "face",
            lambda s: s.update({"ip_adapter.0.to_q_lora.up.weight": torch.ones(9, 3)}),
            r"ip_adapter\.0\.to_q_lora has factors \(3, 16\) and \(9, 3\); expected \(r, 16\) and",
        ),
        (
            "face",
            lambda s: s.update({"ip_adapter.90.to_q_lora.up.weight": torch.ones(9, 3)}),
            "no attention of this network has ip_adapter.90",
        ),
        ("base", lambda s: s.pop("ip_adapter.1.to_k_ip.weight"), "wide and 3 cross-.* and 4 cross"),
        (
            "plus",
            lambda s: s.update({"image_proj.perceiver_resampler.x": torch.ones(1)}),
            "FaceID Plus is not supported",
        ),
        ("plus", lambda s: s.pop("image_proj.latents"), r"of no known kind: no latents"),
    ],
)  # fmt: skip
def test_faulty_files_are_refused_before_they_are_read(made, tmp_path, kind, change, message):
    with pytest.raises(ValueError, match=rf"(?s)changed\.safetensors.*{message}"):
        ip_adapter.open_file(changed(made, tmp_path, kind, change)).check(made[1])


def test_other_files(made, tmp_path):
    for key in ("ip_adapter.1.to_k_ip.weight", "ip_adapter.1.to_k_lora.down.weight"):
        path = changed(made, tmp_path, "face", lambda s, key=key: s[key][0].fill_(torch.nan))
        file = ip_adapter.open_file(path)
        file.check(made[1])
        with pytest.raises(ValueError, match=f"{key} contains NaN or infinity"):
            file.lora(made[1]) if "lora" in key else file.load(made[1])
    with pytest.raises(
        ValueError, match=r"is for a network .* 32 wide .*; this is Stable Diff.* 1 "
    ):
        opened(made, "base").check(SD)
    save_file({"conv_in.weight": torch.ones(1)}, tmp_path / "unet.safetensors")
    with pytest.raises(ValueError, match="no file of an IP-Adapter"):
        ip_adapter.open_file(tmp_path / "unet.safetensors")
    torch.save({"image_proj": {}}, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="they are refused"):
        ip_adapter.open_file(tmp_path / "a.bin")
    whole = (made[3] / "base.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-9])
    with pytest.raises(ValueError, match=r"cut\.safetensors is truncated"):
        ip_adapter.open_file(tmp_path / "cut.safetensors")
