"""Resizing, extraction and combination: what singular values promise, exactly."""

import ml_dtypes
import numpy as np
import pytest
from delta_cases import CONV, MATRIX, full, hadamard, kronecker, low_rank, tucker

from diffusion.adapters.low_rank.deltas import Decomposed, Full, LowRank
from diffusion.adapters.low_rank.merge import merge
from diffusion.adapters.low_rank.products import product
from diffusion.adapters.low_rank.reduction import combine, extract, resize

PATH = "network/conv/kernel"


def assert_close(actual, expected, limit=1e-6):
    assert np.abs(np.asarray(actual) - expected).max() <= limit * np.abs(expected).max()


def random_weight(shape, seed=9):
    return np.random.default_rng(seed).normal(size=shape)


def values(dw):
    return np.linalg.svd(dw.reshape(len(dw), -1), compute_uv=False)


@pytest.mark.parametrize(
    "made", [low_rank(CONV, 3), tucker(CONV, 3), low_rank(MATRIX, 3), low_rank(MATRIX, 9)]
)
def test_resized_to_its_own_rank_is_the_same(made):
    delta, dw = made
    resized = resize({PATH: delta}, rank=min(len(delta.down), 4))[PATH]
    assert_close(product(resized, dw.shape), dw)
    assert float(resized.scale) == 1


@pytest.mark.parametrize(
    "made", [low_rank(CONV, 5), hadamard(CONV, 3), kronecker(CONV), full(CONV), low_rank(MATRIX, 3)]
)
@pytest.mark.parametrize("rank", [1, 2])
def test_error_of_a_smaller_rank_is_the_tail(made, rank):
    delta, dw = made
    resized = resize({PATH: delta}, rank=rank)[PATH]
    assert resized.down.shape[0] == resized.up.shape[1] == rank
    error = np.linalg.norm(product(resized, dw.shape) - dw)
    assert error == pytest.approx(np.sqrt((values(dw)[rank:] ** 2).sum()), rel=1e-5)


def test_energy_chooses_the_smallest_rank_that_keeps_it():
    u, v = (np.linalg.qr(random_weight((6, 6), i))[0] for i in (0, 1))
    spectrum = np.array([4.0, 2, 1, 1])  # squares 16, 4, 1, 1 of 22
    delta = LowRank(v[:4].astype(np.float32), (u[:, :4] * spectrum).astype(np.float32), 1.0)
    for energy, rank in ((0.1, 1), (0.7, 1), (0.75, 2), (0.9, 2), (0.92, 3), (0.96, 4)):
        assert len(resize({PATH: delta}, energy=energy)[PATH].down) == rank
    assert len(resize({PATH: delta}, rank=2, energy=0.96)[PATH].down) == 2
    nothing = delta.replace(scale=0.0)
    assert not product(resize({PATH: nothing}, energy=0.5)[PATH], (6, 6)).any()


def test_what_has_no_singular_values_stays():
    bias, (inner, _) = full((6,))[0], low_rank(CONV, 3)
    norms = Decomposed(inner, np.ones((6, 1, 1, 1), np.float32))
    resized = resize({"a/bias": bias, PATH: norms}, rank=2)
    assert resized["a/bias"] is bias
    assert resized[PATH].magnitude is norms.magnitude
    assert len(resized[PATH].delta.down) == 2


def models(dtype=np.float32):
    """A base and one that differs by known changes of rank 2, a bias and a norm."""
    rng = np.random.default_rng(0)
    attention, conv = low_rank((6, 4), 2, seed=1), low_rank(CONV, 2, seed=2)
    text = low_rank((4, 4), 2, seed=3)
    base = {
        "network": {
            "conv": {"kernel": rng.normal(size=(3, 2, 4, 6)), "bias": rng.normal(size=6)},
            "attn1": {"to_q": {"kernel": rng.normal(size=(4, 6))}},
            "still": {"kernel": rng.normal(size=(3, 3))},
            "norm": {"scale": rng.normal(size=6)},
        },
        "encoders": [{"self_attn": {"q_proj": {"kernel": rng.normal(size=(4, 4))}}}],
    }
    base = cast(base, dtype)
    one = np.float32(1)
    changes = {
        PATH: conv,
        "network/attn1/to_q/kernel": attention,
        "encoders/0/self_attn/q_proj/kernel": text,
        "network/conv/bias": full((6,), 4),
        "network/norm/scale": (Full(np.full(6, 0.5, np.float32), one), np.full(6, 0.5)),
    }
    tuned = merge(base, [({path: delta for path, (delta, _) in changes.items()}, 1.0)])
    return tuned, base, {path: dw for path, (_, dw) in changes.items()}


def cast(tree, dtype):
    if isinstance(tree, dict):
        return {name: cast(value, dtype) for name, value in tree.items()}
    return [cast(v, dtype) for v in tree] if isinstance(tree, list) else tree.astype(dtype)


def test_extraction_finds_the_changes():
    tuned, base, changes = models()
    found = extract(tuned, base, rank=2, others=True)
    assert set(found) == set(changes)
    for path, dw in changes.items():
        assert_close(product(found[path], dw.shape), dw, 2e-6)
    for name in ("network", "encoders"):
        again = merge(base, [(found, 1.0)])[name]
        assert_trees_close(again, tuned[name])
    assert found[PATH].down.shape == (2, 4, 3, 2)
    assert found[PATH].up.shape == (6, 2, 1, 1)


def assert_trees_close(a, b):
    import jax

    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), a, b)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("", {"conv", "to_q", "q_proj"}),
        ("all", {"conv", "to_q"}),
        ("attention", {"to_q"}),
        ("text_attention", {"q_proj"}),
        ("^conv$", {"conv"}),
    ],
)
def test_extraction_of_some_layers(what, expected):
    tuned, base, _ = models()
    found = extract(tuned, base, rank=1, targets=what)
    assert {path.split("/")[-2] for path in found} == expected


def test_extraction_of_low_precision():
    tuned, base, _ = models(ml_dtypes.bfloat16)
    found = extract(tuned, base, energy=1.0)
    old, new = (np.float64(m["network"]["conv"]["kernel"]) for m in (base, tuned))
    difference = np.moveaxis(new - old, (-1, -2), (0, 1))
    assert_close(product(found[PATH], CONV), difference)


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.3, -2.0)])
def test_combination_is_the_weighted_sum(weights):
    (first, a), (second, b), (bias, c) = low_rank(CONV, 2), low_rank(CONV, 3, seed=1), full((6,))
    alone, d = low_rank(MATRIX, 2)
    adapters = [{PATH: first, "x/bias": bias}, {PATH: second, "x/bias": bias, "y/kernel": alone}]
    adapters = list(zip(adapters, weights))
    expected = {
        PATH: weights[0] * a + weights[1] * b,
        "x/bias": sum(weights) * c,
        "y/kernel": weights[1] * d,
    }
    joined, best = combine(adapters), combine(adapters, "svd", rank=5)
    assert joined[PATH].down.shape == (5, 4, 3, 2) and joined[PATH].up.shape == (6, 5, 1, 1)
    for made in (joined, best):
        for path, dw in expected.items():
            assert_close(product(made[path], dw.shape), dw, 2e-6)
    small = combine(adapters, "svd")[PATH]
    assert len(small.down) == 3
    error = np.linalg.norm(product(small, CONV) - expected[PATH])
    assert error == pytest.approx(np.sqrt((values(expected[PATH])[3:] ** 2).sum()), rel=1e-4)


def test_combination_of_other_kinds_is_whole():
    (first, a), (second, b) = low_rank(CONV, 2), hadamard(CONV, 2)
    made = combine([({PATH: first}, 0.5), ({PATH: second}, 2.0)])[PATH]
    assert isinstance(made, Full)
    assert_close(product(made, CONV), 0.5 * a + 2 * b)


def test_linear_combination_is_pefts():
    import peft
    import torch

    torch.manual_seed(0)
    options = dict(r=2, target_modules=["0"], init_lora_weights=False)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6))
    model = peft.get_peft_model(model, peft.LoraConfig(lora_alpha=3, **options), "first")
    model.add_adapter("second", peft.LoraConfig(lora_alpha=1, **options))
    layer, adapters = model.base_model.model[0], []
    for name, alpha, weight in (("first", 3, 0.7), ("second", 1, -0.4)):
        down, up = (getattr(layer, part)[name].weight for part in ("lora_A", "lora_B"))
        factors = (down.detach().numpy(), up.detach().numpy())
        adapters.append(({PATH: LowRank(*factors, np.float32(alpha / 2))}, weight))
    model.add_weighted_adapter(["first", "second"], [0.7, -0.4], "sum", "linear")
    theirs = layer.get_delta_weight("sum").detach().numpy()
    assert_close(product(combine(adapters, "linear")[PATH], MATRIX), theirs)


def test_mistakes_are_named():
    lora, loha = low_rank(CONV, 2)[0], hadamard(CONV, 2)[0]
    norms = Decomposed(lora, np.ones((6, 1, 1, 1), np.float32))
    one, other = [({PATH: lora}, 1.0)], [({PATH: low_rank(CONV, 3)[0]}, 1.0)]
    tuned, base, _ = models()
    fewer = {**base, "network": {k: v for k, v in base["network"].items() if k != "conv"}}
    for call, expected in (
        (lambda: resize({PATH: lora}), "give rank="),
        (lambda: resize({PATH: lora}, rank=0), "rank must"),
        (lambda: resize({PATH: lora}, energy=1.5), "energy must"),
        (lambda: combine(one, "cats"), "Did you mean 'cat'"),
        (lambda: combine(one, rank=3), "how='svd'"),
        (lambda: combine([*one, ({PATH: norms}, 1.0)]), f"{PATH} has DoRA"),
        (lambda: combine([*one, ({PATH: loha}, 1.0)], "linear"), f"{PATH}: how='linear'"),
        (lambda: combine([*one, *other], "linear"), r"equal ranks, got \[2, 3\]"),
        (lambda: combine([({PATH: lora}, np.nan)]), "weight must"),
        (lambda: extract(tuned, fewer, 2), "network/conv/bias"),
        (lambda: extract(base, base, 2), "do not differ"),
        (lambda: extract(tuned, base, 2, targets="("), "no regular expression"),
    ):
        with pytest.raises(ValueError, match=expected):
            call()
