"""Token merging: what is merged with what, where it is exact, and where it takes hold."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.conditioning import Conditioning
from diffusion.models import token_merging as tm
from diffusion.models.attention import SpatialAttention, SpatialTransformer
from diffusion.models.dit import DiT
from diffusion.training import flops

rng = np.random.default_rng(0)
SIDE = 4
X = jnp.asarray(rng.standard_normal((2, SIDE, SIDE, 8)), jnp.float32)
CONTEXT = jnp.asarray(rng.standard_normal((2, 3, 8)), jnp.float32)
KEY = jax.random.key(3)
PIXELS = SpatialAttention(heads=2, groups=2)
TRANSFORMER = SpatialTransformer(heads=2, groups=2, remat=True)


def params_of(module, *args):
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args))
    return jax.tree.map(lambda s: jnp.asarray(0.5 * rng.standard_normal(s.shape), s.dtype), shapes)


PARAMS = {PIXELS: params_of(PIXELS, X), TRANSFORMER: params_of(TRANSFORMER, X, CONTEXT)}
FOUR_ALIKE = X[:, ::2, ::2].repeat(2, 1).repeat(2, 2)


@pytest.mark.parametrize("module", [PIXELS, TRANSFORMER], ids=["pixels", "transformer"])
def test_like_tokens_merge_exactly_and_others_do_not(module):
    apply = partial(module.apply, PARAMS[module])

    @partial(jax.jit, static_argnums=0)
    def run(ratio, x, key):
        function = tm.with_merged_tokens(apply, ratio, SIDE**2, key)
        return apply(x, CONTEXT), function(x, CONTEXT)

    # Each square's tokens are alike and as many: the softmax sees the same shares.
    full, merged = run(0.75, FOUR_ALIKE, KEY)
    np.testing.assert_allclose(merged, full, atol=1e-5)
    full, merged = run(0.75, X, KEY)
    assert np.abs(merged - full).max() > 1e-2
    # Each image by itself, and nothing is stuck: gradients are finite, and of the right size.
    other = X.at[1].set(0.3)
    np.testing.assert_allclose(run(0.75, other, KEY)[1][0], merged[0], atol=1e-5)
    assert tm.with_merged_tokens(apply, 0.0) is apply
    np.testing.assert_array_equal(apply(X, CONTEXT), tm.with_merged_tokens(apply, 0.5)(X, CONTEXT))


def test_gradients_are_those_of_finite_differences():
    apply = tm.with_merged_tokens(partial(PIXELS.apply, PARAMS[PIXELS]), 0.5, SIDE**2, KEY)
    direction = jnp.asarray(rng.standard_normal(X.shape), jnp.float32)
    value = jax.jit(lambda s: (apply(X + s * direction) ** 2).mean())
    slope = jax.jit(jax.grad(value))(0.0)
    difference = (value(3e-3) - value(-3e-3)) / 6e-3
    np.testing.assert_allclose(slope, difference, rtol=1e-2)


@pytest.mark.parametrize("height, width", [(4, 6), (5, 3), (2, 2)])
def test_destinations_are_one_of_each_square(height, width):
    first, chosen = tm.destinations(height, width), tm.destinations(height, width, KEY)
    for tokens in (first, chosen):
        squares = {(t // width // 2, t % width // 2) for t in map(int, tokens)}
        assert len(squares) == len(tokens) == (height // 2) * (width // 2)
    assert first[0] == 0


def test_the_most_alike_are_merged():
    """By hand: of six tokens 0 and 3 are destinations; 1 is 3's twin, 5 nearly 0's."""
    metric = jnp.array([[[1.0, 0], [0, 2], [-1, 0.1], [0, 1], [-1, -1], [3, 0.1]]])
    slots, count = tm.match(metric, jnp.array([0, 3]), 0.34)
    assert count == 4
    assert slots[0, 0] == slots[0, 5] == 0 and slots[0, 3] == slots[0, 1] == 1
    assert sorted(map(int, slots[0, jnp.array([2, 4])])) == [2, 3]
    merged = tm.merge(metric, slots, count)
    np.testing.assert_allclose(merged[0, :2], [[2, 0.05], [0, 1.5]], atol=1e-6)
    back = tm.unmerge(merged, slots)
    np.testing.assert_allclose(back[0, jnp.array([2, 4])], metric[0, jnp.array([2, 4])])
    np.testing.assert_allclose(back[0, 5], back[0, 0])
    slots, count = tm.match(metric, jnp.array([0, 3]), 0.75)  # more than there are
    assert count == 2 and int(slots.max()) == 1


def test_where_it_takes_hold():
    """Self-attention over images of enough tokens: neither cross-attention nor DiTs."""
    count = partial(flops.count, partial(TRANSFORMER.apply, PARAMS[TRANSFORMER]), X, CONTEXT)
    tokens, width = SIDE**2, X.shape[-1]

    def merged(ratio, least):
        function = tm.with_merged_tokens(
            partial(TRANSFORMER.apply, PARAMS[TRANSFORMER]), ratio, least
        )
        return flops.count(function, X, CONTEXT)

    few, match = tokens // 2, 3 * tokens // 4 * tokens // 4 * width // 2
    saved = 2 * len(X) * (2 * (tokens**2 - few**2) * width - match)
    assert merged(0.5, tokens) == count() - saved
    assert merged(0.5, tokens + 1) == count()
    dit = DiT(width=16, depth=1, heads=2, patch=1)
    args = (X, jnp.ones(2), Conditioning())
    shapes = jax.eval_shape(lambda: dit.init(jax.random.key(0), *args))
    whole, same = (
        flops.count(f, shapes, *args) for f in (dit.apply, tm.with_merged_tokens(dit.apply, 0.5, 1))
    )
    assert whole == same
    for ratio in (-0.1, 0.8):
        with pytest.raises(ValueError, match="ratio"):
            tm.with_merged_tokens(dit.apply, ratio)
