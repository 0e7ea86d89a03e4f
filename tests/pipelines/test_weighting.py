"""The syntax of weighted prompts, and the weights' effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion.pipelines.emphasis import check, parse, weigh


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


def factor(x, w, restore):
    """c of one prompt of embeddings x [L, D]."""
    x, w = np.asarray(x, np.float32)[None], np.asarray(w, np.float32)[None]
    out = np.asarray(weigh(x, w, np.ones(w.shape, bool), restore))
    assert np.all(np.isfinite(out))
    return float(out[0, 0, 0] / x[0, 0, 0] / w[0, 0])


def test_what_restores_a_weighted_prompt_is_bounded():
    # Means that cancel say nothing: the norm's factor instead, sqrt(1.25 / 2).
    x, w = [[1.0], [-0.5]], [1, 2]
    np.testing.assert_allclose(factor(x, w, "mean"), np.sqrt(1.25 / 2), rtol=1e-6)
    np.testing.assert_allclose(factor(x, w, "norm"), np.sqrt(1.25 / 2), rtol=1e-6)
    assert factor(x, w, "none") == 1
    np.testing.assert_allclose(factor([[1.0], [0.5]], w, "mean"), 1.5 / 2, rtol=1e-6)
    rng = np.random.default_rng(0)
    for _ in range(50):
        x, w = rng.normal(size=(8, 4)), np.where(rng.random(8) < 0.3, 1.4, 1)
        w[0], w[-1] = 1, 1.4
        assert 1 / 1.4 <= factor(x - x.mean(), w, "norm") <= 1
        assert 1 / 2.8 <= factor(x - x.mean(), w, "mean") <= 2
        np.testing.assert_allclose(factor(3 + x, w, "mean"), (3 + x).sum() / ((3 + x) * w[:, None])
                                   .sum(), rtol=1e-5)  # fmt: skip
    zero = weigh(np.ones((1, 2, 1), "f"), np.zeros((1, 2), "f"), np.ones((1, 2), bool), "norm")
    np.testing.assert_array_equal(zero, 0)


@pytest.mark.parametrize(
    "prompt, message",
    [
        ("a cat AND a dog", "AND, .* for the word, write and"),
        ("a [cat:dog:0.5] runs", r"\[cat:dog:0\.5\], .* write \\\[cat:dog:0\.5\\\] with weighted"),
        ("[cat:10]", r"\[cat:10\], a text that changes"),
        ("[cat::0.5]", r"\[cat::0\.5\]"),
        ("[(red:1.2) cat:[old] dog:.5]", "changes while sampling"),
        ("[cat|dog]", r"\[cat\|dog\]"),
    ],
)
def test_what_prompts_cannot_say_is_refused(prompt, message):
    with pytest.raises(ValueError, match=message):
        check(prompt)


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "SAND and candy",
        r"\[cat:dog:0.5\]",
        "[cat]",
        "[(red:1.3) cat]",
        r"\[a|b\]",
        "a: b|c [d]",
    ],
)
def test_plain_prompts_are_left_alone(prompt):
    check(prompt)
