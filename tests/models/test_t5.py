"""T5's encoder: positions, masks, memory, precision; test_encoders.py has the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.models.t5 import T5Encoder, buckets

NET = T5Encoder(
    vocab_size=20, width=16, depth=2, heads=2, head_width=6, hidden=24, gated=True, buckets=8,
    furthest=6,
)  # fmt: skip
IDS = jnp.array([[3, 4, 5, 6, 7, 8, 1], [3, 4, 5, 1, 0, 0, 0]])
MASK = IDS > 0
PARAMS = NET.init(jax.random.key(0), IDS)
APPLY = jax.jit(NET.apply)


def test_buckets_by_hand():
    # Of 8: half for either direction, two of these exact (0 and 1), then [2, 4) and [4, ...).
    expected = [0, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    np.testing.assert_array_equal(buckets(10, 8, 8)[:, 0], expected)
    np.testing.assert_array_equal(buckets(10, 8, 8)[0, 1:], np.add(expected, 4)[1:])


def test_what_is_masked_has_no_influence():
    out = APPLY(PARAMS, IDS, MASK)
    assert out.shape == (2, 7, 16)
    other = APPLY(PARAMS, IDS.at[1, 5].set(9), MASK)
    np.testing.assert_allclose(out[:, :4], other[:, :4], atol=1e-6)
    short = APPLY(PARAMS, IDS[1:, :4])
    np.testing.assert_allclose(out[1:, :4], short, atol=1e-5)
    assert np.abs(APPLY(PARAMS, IDS, MASK | True)[1, :4] - short[0]).max() > 1e-3


def test_blocks_may_be_recomputed():
    again = NET.clone(remat=True)
    assert "remat" in str(jax.make_jaxpr(again.apply)(PARAMS, IDS))
    assert "remat" not in str(jax.make_jaxpr(NET.apply)(PARAMS, IDS))
    assert jax.eval_shape(again.init, jax.random.key(0), IDS) == jax.eval_shape(lambda: PARAMS)


def test_half_precision():
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    out = jax.jit(NET.clone(dtype=jnp.bfloat16).apply)(half, IDS, MASK)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(jnp.float32), APPLY(PARAMS, IDS, MASK), atol=0.2)


def test_errors():
    with pytest.raises(ValueError, match="buckets=6, furthest=6: expected a multiple of 4"):
        jax.eval_shape(NET.clone(buckets=6).init, jax.random.key(0), IDS)
