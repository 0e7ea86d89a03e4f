"""CLIP's transformers: causality, pooling, memory, precision; test_encoders.py has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.clip import ClipText, ClipVision

NET = ClipText(vocab_size=50, width=16, depth=2, heads=2, hidden=24, length=9, projection=5)
IDS = jnp.array([[48, 3, 4, 5, 49, 49, 49, 49, 49], [48, 3, 4, 7, 8, 9, 49, 0, 0]])
PARAMS = NET.init(jax.random.key(0), IDS)
APPLY = jax.jit(NET.apply)


def test_a_token_does_not_see_later_ones():
    out = APPLY(PARAMS, IDS)
    assert [h.shape for h in out.hidden] == [(2, 9, 16)] * 3
    same = np.isclose(out.last[0], out.last[1], atol=1e-6).all(-1)
    np.testing.assert_array_equal(same, [True] * 3 + [False] * 6)
    # The texts' ends, though not padding, decide what is pooled.
    np.testing.assert_array_equal(out.pooled, [out.last[0, 4], out.last[1, 6]])
    padded = APPLY(PARAMS, IDS.at[1, 7:].set(49))
    np.testing.assert_allclose(padded.projected, out.projected, atol=1e-6)


def test_the_end_may_be_another_token():
    net = NET.clone(end=7)
    out = jax.jit(net.apply)(PARAMS, IDS.at[0, 2].set(7).at[1, 5].set(7))
    np.testing.assert_array_equal(out.pooled, [out.last[0, 2], out.last[1, 3]])


def test_norm_and_mask():
    out = APPLY(PARAMS, IDS)
    normed = NET.apply(PARAMS, out.hidden[-1], method="norm")
    np.testing.assert_allclose(normed, out.last, atol=1e-6)
    mask = jnp.arange(9)[None] != jnp.array([[2], [10]])
    changed = APPLY(PARAMS, IDS.at[0, 2].set(30), mask)
    masked = APPLY(PARAMS, IDS, mask)
    np.testing.assert_allclose(changed.last[0, 3:], masked.last[0, 3:], atol=1e-6)
    np.testing.assert_allclose(masked.last[1], out.last[1], atol=1e-6)
    assert np.abs(masked.last[0, 3:] - out.last[0, 3:]).max() > 1e-3


def test_layers_may_be_recomputed():
    again = NET.clone(remat=True)
    assert "remat" in str(jax.make_jaxpr(again.apply)(PARAMS, IDS))
    assert "remat" not in str(jax.make_jaxpr(NET.apply)(PARAMS, IDS))
    assert jax.eval_shape(again.init, jax.random.key(0), IDS) == jax.eval_shape(lambda: PARAMS)


def test_half_precision():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    low = NET.clone(dtype=jnp.bfloat16)
    out, exact = jax.jit(low.apply)(half, IDS), APPLY(PARAMS, IDS)
    assert all(a.dtype == jnp.bfloat16 for a in jax.tree.leaves(out))
    np.testing.assert_allclose(out.last.astype(jnp.float32), exact.last, atol=0.1)


@pytest.mark.parametrize(
    "net, shape, message",
    [
        (NET, (1, 10), "10 tokens; .* at most 9"),
        (NET.clone(heads=3), (1, 9), "width=16 cannot be split into heads=3"),
        (NET.clone(activation="relu"), (1, 9), "activation='relu'; expected quick_gelu or gelu"),
        (ClipVision(), (1, 224, 225, 3), r"\(1, 224, 225, 3\); expected \(B, 224, 224, 3\)"),
    ],
)
def test_errors(net, shape, message):
    kind = jnp.int32 if len(shape) == 2 else jnp.float32
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, kind))
