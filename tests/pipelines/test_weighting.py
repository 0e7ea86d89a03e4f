"""The syntax of weighted prompts, and the weights' effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.pipelines.emphasis import parse, weigh


@pytest.mark.parametrize(
    "prompt, expected",
    [
        ("", []),
        ("a cat, a dog: two", [("a cat, a dog: two", 1)]),
        ("a (red:1.3) cat", [("a ", 1), ("red", 1.3), (" cat", 1)]),
        ("(red : .5 )", [("red ", 0.5)]),
        ("(a) ((b)) [c] [[d]]", [
            ("a", 1.1), (" ", 1), ("b", 1.1**2), (" ", 1), ("c", 1 / 1.1), (" ", 1),
            ("d", 1 / 1.1**2),
        ]),
        ("(a (b:2) c)", [("a ", 1.1), ("b", 2.2), (" c", 1.1)]),
        ("((a:2):1.5)", [("a", 3)]),
        (r"\(a\) \[b\] c\\d e\f", [(r"(a) [b] c\d e\f", 1)]),
        (r"(a \(b\):1.2)", [("a (b)", 1.2)]),
        ("x (a [b", [("x ", 1), ("a ", 1.1), ("b", 1)]),
        ("a) b]:1.2) c", [("a) b]:1.2) c", 1)]),
        ("[a:1.3]", [("a:1.3", 1 / 1.1)]),
        ("(a:b:-1)", [("a:b", -1)]),
        ("(a:1.2.3)", [("a:1.2.3", 1.1)]),
        ("wo(r:1)d and [(more)]", [("word and more", 1)]),
    ],
)  # fmt: skip
def test_syntax(prompt, expected):
    found = parse(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    np.testing.assert_allclose([w for _, w in found], [w for _, w in expected], rtol=1e-12)


def test_weights_scale_tokens_and_keep_the_mean():
    states = 0.3 + jax.random.normal(jax.random.key(0), (3, 4, 5))
    weights = jnp.array([[1, 2, 1, 1], [1, 1, 1, 1], [0.5, 1, 1, 3.0]])
    counted = jnp.array([[True] * 4, [True] * 4, [True, True, False, False]])
    out = jax.jit(weigh)(states, weights, counted)
    np.testing.assert_array_equal(out[1], states[1])
    np.testing.assert_allclose(out[0].mean(), states[0].mean(), rtol=1e-5)
    np.testing.assert_allclose(out[2, :2].mean(), states[2, :2].mean(), rtol=1e-5)
    ratio = np.asarray(out / states)
    np.testing.assert_allclose(ratio / ratio[:, 1:2, :1], weights[..., None] / weights[:, 1:2, None]
                               * np.ones(5), rtol=1e-5)  # fmt: skip
    low = jax.jit(weigh)(states.astype(jnp.bfloat16), weights, counted)
    assert low.dtype == jnp.bfloat16
