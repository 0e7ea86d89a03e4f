"""The bidirectional name tables."""

import jax
import numpy as np
import pytest

from diffusion.conditioning import Conditioning
from diffusion.models.unet import UNet
from diffusion.pretrained import names as n

TABLE = n.Names(
    n.dotted("linear_1"),
    rows=(
        n.Row(
            (r"layers_(\d+)/qkv/(kernel|bias)",),
            tuple(rf"layers.\1.{part}.@\2" for part in "qkv"),
            n.fused(3),
        ),
        n.Row((r"(\w+)/to_q/kernel", r"\1/to_k/kernel"), (r"\1.in_proj",), n.unfused(2)),
        n.Row((r"time/kernel",), ("a.time", "b.time"), n.copies(2, n.KERNEL)),
        n.Row((r"proj/kernel",), ("proj.conv",), n.POINTWISE),
    ),
    aliases=((r"^model\.", ""),),
    ignored=r".*position_ids",
)


def params():
    rng = np.random.default_rng(0)
    shapes = {
        "layers_0": {"qkv": {"kernel": (4, 6), "bias": (6,)}, "linear_1": {"kernel": (2, 5)}},
        "conv_1": {"kernel": (3, 3, 2, 4), "bias": (4,)},
        "attention": {"to_k": {"kernel": (3, 2)}, "to_q": {"kernel": (3, 2)}},
        "time": {"kernel": (2, 3)},
        "proj": {"kernel": (4, 2)},
        "norm": {"scale": (3,), "bias": (3,)},
        "token": {"embedding": (7, 2)},
        "free": (2,),
    }
    return jax.tree.map(
        lambda s: rng.normal(size=s), shapes, is_leaf=lambda s: isinstance(s, tuple)
    )


def test_tensors_are_where_the_table_says():
    ours = params()
    theirs = dict(n.to_tensors(TABLE, ours))
    assert set(theirs) == {
        *(f"layers.0.{part}.@{leaf}" for part in "qkv" for leaf in ("kernel", "bias")),
        "layers.0.linear_1.weight", "conv.1.weight", "conv.1.bias", "attention.in_proj",
        "a.time", "b.time", "proj.conv", "norm.weight", "norm.bias", "token.weight", "free",
    }  # fmt: skip
    qkv = ours["layers_0"]["qkv"]["kernel"]
    np.testing.assert_array_equal(theirs["layers.0.k.@kernel"], qkv[:, 2:4].T)
    np.testing.assert_array_equal(
        theirs["conv.1.weight"][3, 1], ours["conv_1"]["kernel"][:, :, 1, 3]
    )
    np.testing.assert_array_equal(
        theirs["attention.in_proj"][2:], ours["attention"]["to_k"]["kernel"].T
    )
    np.testing.assert_array_equal(theirs["b.time"], ours["time"]["kernel"].T)
    assert theirs["proj.conv"].shape == (2, 4, 1, 1)


def test_round_trip_reads_and_writes_the_same():
    ours = params()
    theirs = {f"model.{key}": value for key, value in n.to_tensors(TABLE, ours)}
    theirs["model.position_ids"] = np.arange(3)
    shapes = jax.eval_shape(lambda: ours)
    jax.tree.map(np.testing.assert_array_equal, n.from_tensors(TABLE, shapes, theirs), ours)


def test_every_tensor_is_accounted_for():
    theirs = dict(n.to_tensors(TABLE, params()))
    del theirs["norm.bias"]
    theirs["norm.biass"] = np.zeros(3)
    theirs["free"] = np.zeros(5)
    with pytest.raises(ValueError) as error:
        n.from_tensors(TABLE, params(), theirs, what="model.safetensors")
    for part in (
        "model.safetensors", "1 missing: norm.bias", "1 unexpected: norm.biass",
        "1 misshapen: free (5,), expected (2,)", "(should norm.biass be norm.bias?)",
    ):  # fmt: skip
        assert part in str(error.value)


def test_copies_that_differ_are_refused():
    theirs = dict(n.to_tensors(TABLE, params()))
    theirs["b.time"] = theirs["b.time"] + 1
    with pytest.raises(ValueError, match=r"a\.time.*not equal"):
        n.from_tensors(TABLE, params(), theirs)


def test_one_weight_under_two_names_must_be_one():
    theirs = dict(n.to_tensors(TABLE, params()))
    theirs["model.free"] = theirs["free"]
    jax.tree.map(np.testing.assert_array_equal, n.from_tensors(TABLE, params(), theirs), params())
    theirs["model.free"] = theirs["free"] + 1
    with pytest.raises(ValueError, match=r"free and model\.free .* not equal"):
        n.from_tensors(TABLE, params(), theirs)


def test_a_table_that_joins_what_it_should_not_is_refused():
    with pytest.raises(ValueError, match="several parameters"):
        n.bind(n.Names(lambda path: "x"), {"a": {"bias": np.zeros(1)}, "b": {"bias": np.zeros(1)}})
    table = n.Names(n.dotted(), (n.Row(("a/bias", "b/bias"), ("x",), n.unfused(2)),))
    with pytest.raises(ValueError, match="b/bias"):
        n.bind(table, {"a": {"bias": np.zeros(1)}})


def test_a_full_size_network_is_bound_without_memory():
    net = UNet(widths=(64, 64), attention=(1, 0), mid_attention=1, num_heads=8)
    cond = Conditioning(context=jax.ShapeDtypeStruct((1, 7, 16), np.float32))
    x, t = (jax.ShapeDtypeStruct(s, np.float32) for s in ((1, 8, 8, 4), (1,)))
    shapes = jax.eval_shape(net.init, jax.random.key(0), x, t, cond)["params"]
    matches = n.bind(n.Names(n.dotted("linear_1", "linear_2")), shapes)
    keys = {key: shape for match in matches for key, shape in zip(match.theirs, match.shapes)}
    assert keys["down_blocks.0.resnets.1.conv1.weight"] == (64, 64, 3, 3)
    assert keys["time_embedding.linear_1.weight"] == (256, 64)
    assert keys["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"] == (64, 16)
