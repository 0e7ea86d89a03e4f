"""When cuDNN's attention is taken, and what it is asked for; it is lowered here, not run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.kernels import fused_attention
from diffusion.models.kernels.attention import attend
from diffusion.models.kernels.fused_attention import unfused


@pytest.fixture
def hopper(monkeypatch):
    """As on a GPU, as far as tracing and lowering go."""
    inside = pytest.importorskip("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(inside, "check_cudnn_version", lambda: 91000)
    monkeypatch.setattr(inside, "check_compute_capability", lambda _: True)
    monkeypatch.setattr(fused_attention, "widest_head", lambda: 256)


def lowered(function, *args):
    """The kernels that it calls on a GPU, and its text."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return re.findall(r"@__cudnn\$(\w+)\(([^)]*)\)", text), text


def arrays(keys=64, width=40, dtype=jnp.bfloat16):
    q, k = ((2, length, 4, width) for length in (64, keys))
    return [jax.ShapeDtypeStruct(shape, dtype) for shape in (q, k, k)]


def test_on_a_gpu_attention_in_half_precision_is_one_kernel(hopper):
    calls, text = lowered(attend, *arrays())
    assert [name for name, _ in calls] == ["fmhaSoftmax"]
    assert len(calls[0][1].split(",")) == 3  # q, k, v and no lengths
    assert f"fmha_scale\\22: {40**-0.5:.5f}"[:-1] in text and "22NO_MASK" in text

    def loss(q, k, v):
        return attend(q, k, v).astype(jnp.float32).sum()

    calls, _ = lowered(jax.grad(loss, (0, 1, 2)), *arrays())
    assert [name for name, _ in calls] == ["fmhaSoftmax", "fmhaSoftmaxBackward"]


def test_77_keys_are_filled_up_to_80_of_which_77_count(hopper):
    calls, text = lowered(attend, *arrays(keys=77))
    assert len(calls) == 1 and len(calls[0][1].split(",")) == 5  # and lengths of queries and keys
    assert re.search(r"stablehlo.pad .*tensor<2x80x4x40xbf16>", text)
    assert "dense<77> : tensor<2xi32>" in text or "dense<77> : tensor<i32>" in text
    assert "22PADDING" in text


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": jnp.float32},
        {"width": 44},
        {"width": 512},
        {"mask": jnp.ones((2, 64), bool)},
        {"causal": True},
        {"implementation": "xla"},
    ],
    ids=str,
)
def test_what_cudnn_does_not_take_is_left_to_xla(hopper, change):
    options = {k: v for k, v in change.items() if k not in ("dtype", "width")}
    shapes = arrays(**{k: v for k, v in change.items() if k in ("dtype", "width")})
    assert lowered(lambda q, k, v: attend(q, k, v, **options), *shapes)[0] == []


def test_filled_up_keys_change_nothing(monkeypatch):
    plain, given = jax.nn.dot_product_attention, []

    def on_xla(*args, implementation, **options):
        given.append((implementation, args[1].shape[1]))
        return plain(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", on_xla)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, 2, 8)), jnp.float32) for n in (6, 13, 13))
    filled = fused_attention.attend_cudnn(q, k, v)
    np.testing.assert_allclose(filled, plain(q, k, v), atol=1e-6)
    assert given == [("cudnn", 16)]


def test_unfused_functions_can_be_differentiated_forwards(hopper):
    def map_of(q):
        return attend(q, q, q)

    q = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
    with pytest.raises(TypeError, match="forward-mode"):
        lowered(lambda q: jax.jvp(map_of, (q,), (q,)), q)
    jax.jvp(unfused(map_of), (q,), (q,))
    assert lowered(map_of, q)[0]  # afterwards as before


def test_here_there_is_none():
    assert fused_attention.widest_head() == 0
    assert not fused_attention.suits(*arrays())
