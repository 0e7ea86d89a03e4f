import jax.numpy as jnp
import numpy as np

from diffusion.conditioning import Conditioning, concatenate, drop, from_batch, null_like

COND = Conditioning(label=jnp.array([1, 2]), context=jnp.ones((2, 3, 4)), image=jnp.ones((2, 5)))


def test_null_replaces_only_what_is_named_and_present():
    null = null_like(COND, label=10, context=jnp.zeros((3, 4)), pooled=0.0)
    np.testing.assert_array_equal(null.label, [10, 10])
    assert null.label.dtype == COND.label.dtype
    assert null.context.shape == (2, 3, 4) and not null.context.any()
    np.testing.assert_array_equal(null.image, COND.image)
    assert null.pooled is None


def test_drop_is_per_example():
    dropped = drop(COND, null_like(COND, label=10, context=0.0), jnp.array([True, False]))
    np.testing.assert_array_equal(dropped.label, [10, 2])
    np.testing.assert_array_equal(dropped.context.sum((1, 2)), [0, 12])


def test_concatenate_and_from_batch():
    both = concatenate(COND, null_like(COND, label=10))
    np.testing.assert_array_equal(both.label, [1, 2, 10, 10])
    assert both.context.shape == (4, 3, 4) and both.pooled is None
    cond = from_batch({"x": np.zeros(2), "label": np.arange(2), "index": np.arange(2)})
    assert cond.context is None
    np.testing.assert_array_equal(cond.label, [0, 1])
