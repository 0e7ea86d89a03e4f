"""LoRA and its relatives in training: how they begin, their gradients, and what they are for."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from diffusion import specs
from diffusion.adapters.choices import CHOICES
from diffusion.adapters.low_rank import targets
from diffusion.adapters.low_rank.kinds import halves
from diffusion.adapters.low_rank.lora import lora
from diffusion.adapters.low_rank.merge import merge
from diffusion.adapters.low_rank.reduction import extract
from diffusion.conditioning import Conditioning
from diffusion.models import unet
from diffusion.models.dit import DiT, stack_blocks
from diffusion.models.unet import UNet
from diffusion.pretrained import models
from diffusion.pretrained.adapters import layers, reading, writing

TINY = dict(widths=(8, 16), blocks=1, norm_groups=4, in_channels=4, out_channels=4)
TINY = UNet(**TINY, attention=(1, 0), mid_attention=1, num_heads=2, context_width=6)
SD15 = unet.sd15(in_channels=4, context_width=768)
SDXL = unet.sdxl(in_channels=4, context_width=2048, added_width=2816)
KEY = jax.random.key(0)
PROJ_IN = "down_blocks_0/attentions_0/proj_in/kernel"


def randomised(shapes, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(size=s.shape).astype(dtype), shapes)


def dit_shapes():
    net = DiT(width=16, depth=2, heads=2, patch=2, num_classes=3)
    cond = Conditioning(label=jnp.zeros(1, int))
    return jax.eval_shape(net.init, KEY, jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), cond)["params"]


UNET, TRANSFORMER = randomised(models.shapes(TINY)), randomised(dit_shapes())
STACKED = jax.tree.map(np.asarray, stack_blocks(TRANSFORMER))
FEW = {"fc": (7, 5), "conv": (3, 3, 4, 6), "point": (1, 1, 4, 6), "blocks": (2, 8, 6)}
FEW = {name: {"kernel": jax.ShapeDtypeStruct(shape, np.float32)} for name, shape in FEW.items()}
FEW = randomised(FEW)
"""A matrix, two convolutions, and a stack of matrices."""


def trained(params, seed=5):
    """What an adapter's parameters could be later: all of them others."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: a + 0.1 * rng.normal(size=a.shape).astype(np.float32), params)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
def test_fresh_adapter_leaves_the_base_to_the_bit(kind, dora):
    base = FEW
    own = lora(3, targets="all", kind=kind, dora=dora)
    params = jax.jit(own.init)(KEY, base)
    merged = jax.jit(own.merge)(base, params)
    assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), merged, base))
    changed = flatten_dict(own.merge(base, trained(params)), sep="/")
    assert all(not np.array_equal(changed[path], w) for path, w in kernels(base).items())


def kernels(base):
    return {k: w for k, w in flatten_dict(base, sep="/").items() if k.endswith("/kernel")}


shapes = functools.cache(models.shapes)


# Counted in the networks of the published adapters.
@pytest.mark.parametrize(
    ("net", "what", "rank", "count", "modules"),
    [
        (SD15, "attention", 4, 797_184, 128),
        (SD15, "attention", 16, 3_188_736, 128),
        (SD15, "transformer", 4, 1_695_744, 192),
        (SD15, "transformer", 16, 6_782_976, 192),
        (SD15, "_block", 64, 67_252_224, 278),
        (SDXL, "attention", 4, 5_806_080, 560),
        (SDXL, "attention", 16, 23_224_320, 560),
        (SDXL, "transformer", 4, 10_639_360, 722),
        (SDXL, "transformer", 16, 42_557_440, 722),
        (SDXL, "_block", 64, 196_751_360, 788),
    ],
)
def test_published_numbers_of_parameters(net, what, rank, count, modules):
    own = lora(rank, targets=what)
    params = jax.eval_shape(own.init, KEY, shapes(net))
    assert len(params) == modules
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize("path", ["conv_in/kernel", "mid_block/attentions_0/proj_in/kernel"])
def test_gradients_are_those_of_the_factors(path):
    """dL/dB = s G A^T and dL/dA = s B^T G for the gradient G of the merged weight."""
    own = lora(2, alpha=6.0, targets=f"^{path.removesuffix('/kernel')}$")
    params = trained(own.init(KEY, UNET))
    weight = flatten_dict(UNET, sep="/")[path]
    cotangent = np.random.default_rng(1).normal(size=weight.shape)

    def loss(params):
        return jnp.sum(flatten_dict(own.merge(UNET, params), sep="/")[path] * cotangent)

    actual = jax.grad(loss)(params)[path]
    g = np.moveaxis(cotangent, (-1, -2), (0, 1)).reshape(weight.shape[-1], -1)
    a, b = (np.asarray(params[path][name], np.float64) for name in ("down", "up"))
    a, b = a.reshape(2, -1), b.reshape(-1, 2)
    expected = {"up": 3 * g @ a.T, "down": 3 * b.T @ g}
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name].reshape(value.shape), value, rtol=1e-4, atol=1e-4)


def test_gradients_of_dora_take_the_norm_as_given():
    """W' = m V / n with n = ||V|| a constant: dL/dm = <G, V> / n, dL/dV = m G / n."""
    path = "mid_block/resnets_0/conv1/kernel"
    own = lora(2, targets=f"^{path.removesuffix('/kernel')}$", dora=True)
    fresh = own.init(KEY, UNET)
    weight = flatten_dict(UNET, sep="/")[path]
    out = weight.shape[-1]
    w, g = (np.random.default_rng(i).normal(size=(out, weight.size // out)) for i in (1, 2))
    cotangent = np.moveaxis(g.reshape(out, -1, 3, 3), (0, 1), (-1, -2))
    w = np.moveaxis(weight, (-1, -2), (0, 1)).reshape(out, -1).astype(np.float64)

    def loss(params):
        return jnp.sum(flatten_dict(own.merge(UNET, params), sep="/")[path] * cotangent)

    for params in (fresh, trained(fresh)):  # m = n, and m other than n
        actual = jax.grad(loss)(params)[path]
        a, b, m = (np.asarray(params[path][n], np.float64) for n in ("down", "up", "magnitude"))
        a, b, m = a.reshape(2, -1), b.reshape(-1, 2), m.reshape(-1, 1)
        v = w + b @ a
        n = np.sqrt((v**2).sum(1, keepdims=True))
        expected = {"magnitude": (g * v).sum(1) / n[:, 0], "up": (m / n * g) @ a.T}
        expected["down"] = b.T @ (m / n * g)
        for name, value in expected.items():
            found = np.asarray(actual[name]).reshape(value.shape)
            np.testing.assert_allclose(found, value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("dora", [False, True])
def test_deltas_are_what_is_merged(kind, dora):
    own = lora(2, 1.0, "fc|conv|point", kind=kind, dora=dora)
    params = trained(own.init(KEY, FEW))
    deltas = {f"network/{path}": delta for path, delta in own.deltas(params).items()}
    elsewhere = merge({"network": FEW}, [(deltas, 1.0)])["network"]
    here = own.merge(FEW, params)
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(elsewhere)):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dora", [False, True])
def test_stacked_layers_have_factors_of_their_own(dora):
    own = lora(2, targets="attention", dora=dora)
    params = trained(own.init(KEY, STACKED))
    merged = own.merge(STACKED, params)["blocks"]
    for i in range(2):
        one = {
            path.replace("blocks/", f"blocks_{i}/"): jax.tree.map(lambda a, i=i: a[i], factors)
            for path, factors in params.items()
        }
        alone = own.merge(TRANSFORMER, one)[f"blocks_{i}"]
        for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(alone)):
            np.testing.assert_allclose(a[i], b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("kind", "dora"), [("lora", False), ("lora", True), ("lokr", False)])
def test_stacks_go_out_as_matrices(kind, dora, tmp_path):
    """To a file and back, and merged one by one, they are what the run itself draws with."""
    net = DiT(patch=2, width=16, depth=2, heads=2, scan=True)
    table = layers.table(net, (), {"network": STACKED})
    own = lora(2, 3, targets="all", kind=kind, dora=dora)
    params = trained(own.init(KEY, STACKED))
    deltas = {f"network/{path}": delta for path, delta in own.deltas(params).items()}
    assert "network/blocks/attn/qkv/kernel/1" in deltas
    writing.write(tmp_path / "x.safetensors", deltas, table)
    read = reading.read(tmp_path / "x.safetensors", table)
    assert not read.unused
    here, one = own.merge(STACKED, params), next(iter(deltas))
    elsewhere = merge({"network": STACKED}, [(read.deltas, 1.0)])["network"]
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(elsewhere), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
    found = extract({"network": here}, {"network": STACKED}, energy=1.0, targets="attention")
    assert {path for path in deltas if "/attn/" in path} == set(found)
    none = merge({"network": STACKED}, [({one: deltas[one]}, 0.0)])["network"]
    jax.tree.map(np.testing.assert_array_equal, none, STACKED)


def test_begins_as_published():
    base = {"fc": {"kernel": np.zeros((400, 50), np.float32)}}
    (own,) = lora(8, targets="all").init(KEY, base).values()
    assert own["down"].shape == (8, 400) and own["up"].shape == (50, 8)
    assert not own["up"].any()
    bound = 400**-0.5
    assert abs(own["down"]).max() <= bound
    assert np.std(own["down"]) == pytest.approx(bound / 3**0.5, rel=0.05)
    (own,) = lora(8, targets="all", normal=True).init(KEY, base).values()
    assert np.std(own["down"]) == pytest.approx(1 / 8, rel=0.05)
    assert [halves(n) for n in (127, 128, 250, 360)] == [(1, 127), (8, 16), (10, 25), (18, 20)]


def test_no_two_layers_begin_alike():
    firsts = [own["down"].ravel()[:4] for own in lora(targets="all").init(KEY, UNET).values()]
    assert len({tuple((first / abs(first).max()).tolist()) for first in firsts}) == len(firsts)


def names(what, base):
    """The last names of the layers that a preset chooses."""
    return {layer.rpartition("/")[2] for layer in targets.choose(targets.layers(base), {what: 1})}


def test_presets():
    text = {"layers_0": {"self_attn": {"q_proj": 1}, "mlp": {"fc1": 1}}, "text_projection": 1}
    text = jax.tree.map(lambda _: {"kernel": np.zeros((2, 2))}, text)
    joint = {"text": {"encoders_0": text}, "image": UNET}
    attention = {"to_q", "to_k", "to_v", "to_out_0"}
    for base in (UNET, joint):
        assert names("attention", base) == attention
        assert names("transformer", base) == attention | {"proj_in", "proj_out", "proj", "net_2"}
        assert {"conv_in", "conv1", "time_emb_proj", "conv_shortcut"} < names("all", base)
    assert not any("text" in layer for layer in targets.choose(targets.layers(joint), {"all": 1}))
    assert names("text_attention", joint) == {"q_proj"}
    assert names("text_transformer", joint) == {"q_proj", "fc1"}
    for base in (TRANSFORMER, STACKED):
        assert names("attention", base) == {"qkv", "proj"}
        assert names("transformer", base) == {"qkv", "proj", "fc1", "fc2"}
        assert {"adaLN_modulation", "linear", "x_embedder"} < names("all", base)


def test_ranks_and_alphas_by_pattern():
    own = lora(targets={"attn1": 2, "attention": 3, "conv_in": 4}, alpha={"to_q": 6, "conv": 1.0})
    params = own.init(KEY, UNET)
    scales = {path: float(delta.scale) for path, delta in own.deltas(params).items()}
    for path, factors in params.items():
        rank = 4 if "conv_in" in path else 2 if "attn1" in path else 3
        alpha = 1 if "conv_in" in path else 6 if "to_q" in path else rank
        assert len(factors["down"]) == rank
        assert scales[path] == pytest.approx(alpha / rank)
    own = lora(4, 6.0, "conv_in", rank_stabilised=True)
    (delta,) = own.deltas(own.init(KEY, UNET)).values()
    assert float(delta.scale) == pytest.approx(3)


def test_dropout_leaves_out_rows_and_enlarges_the_others():
    own = lora(64, targets="conv_in|fc1|proj_in", dropout=0.25)
    for base in (UNET, STACKED):
        params = own.init(KEY, base)
        dropped = own.dropped(params, jax.random.key(1))
        kept = []
        for path, factors in params.items():
            ratio = np.asarray(dropped[path]["down"] / factors["down"])
            rows = ratio.reshape(-1, *ratio.shape[-1:]) if ratio.ndim < 4 else ratio.reshape(64, -1)
            assert np.allclose(rows, rows[:, :1])
            assert np.allclose(rows[:, 0] * (rows[:, 0] - 4 / 3), 0, atol=1e-6)
            kept += list(rows[:, 0] > 0)
            assert np.array_equal(dropped[path]["up"], factors["up"])
        assert np.mean(kept) == pytest.approx(0.75, abs=0.15)
    assert lora().dropped(params, KEY) is params


def test_small_changes_of_a_base_in_low_precision_stay():
    base = jax.tree.map(lambda a: a.astype(jnp.bfloat16), UNET)
    own = lora(2, targets="conv_in")
    params = {
        "conv_in/kernel": {"down": jnp.ones((2, 4, 3, 3)), "up": jnp.full((8, 2, 1, 1), 5e-6)}
    }
    merged = own.merge(base, params)["conv_in"]["kernel"]
    wide = base["conv_in"]["kernel"].astype(jnp.float32)
    np.testing.assert_allclose(merged - wide, 1e-5, rtol=0.05)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("lora(rank=0)", "the number of 'attention' must be"),
        ("lora(rank=1.5)", "wrong type"),
        ("lora(targets='atention')", "no layer's path.*nearest: attention"),
        ("lora(targets={'attention': 4, 'to_q': 2})", "earlier patterns take all"),
        ("lora(targets='(')", "no regular expression"),
        ("lora(targets={})", "at least one"),
        ("lora(targets={'attention': 2.5})", "whole numbers"),
        ("lora(alpha=0)", "alpha=0"),
        ("lora(alpha=-1.0)", "alpha"),
        ("lora(alpha={'conv_in': 2})", "alpha='conv_in' is in no layer's path"),
        ("lora(kind='loker')", "Did you mean 'lokr'"),
        ("lora(kind='loha', dropout=0.1)", "kind='lora' alone"),
        ("lora(dropout=1.0)", "dropout"),
        ("lora(dura=True)", "no option 'dura'"),
    ],
)
def test_mistakes_are_named(text, expected):
    with pytest.raises(ValueError, match=expected):
        specs.value(text, CHOICES, "config.objective.adapter").init(KEY, UNET)


def test_another_network_is_refused_by_name():
    own = lora(2, targets="proj_in|to_k")
    params = own.init(KEY, UNET)
    other = flatten_dict(UNET, sep="/")
    other[PROJ_IN] = np.zeros((1, 1, 9, 9), np.float32)
    with pytest.raises(ValueError, match=re.escape(f"{PROJ_IN}: factors make a change (8, 8)")):
        own.merge(unflatten_dict(other, sep="/"), params)
    del other[PROJ_IN]
    with pytest.raises(ValueError, match=f"no parameter {PROJ_IN}; nearest: "):
        own.merge(unflatten_dict(other, sep="/"), params)
