"""dW of every kind, and its merging: definitions in float64, then others, then behaviour."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from delta_cases import CONV, MATRIX, POINTWISE, cases, hadamard, kronecker, low_rank, tucker

from diffusion.adapters.low_rank import merge as merging
from diffusion.adapters.low_rank.deltas import Decomposed, Full, LowRank
from diffusion.adapters.low_rank.merge import merge
from diffusion.adapters.low_rank.products import product

PATH = "network/conv/kernel"
CASES = cases()


def random_weight(shape, seed=9):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def ours(w):
    return np.moveaxis(w, (0, 1), (-1, -2)) if w.ndim > 1 else w


def model(weight, leaf="kernel", dtype=np.float32):
    """Pipelines' parameters with one weight, given in PyTorch's layout, and others."""
    other = {"kernel": np.ones((2, 2), np.float32)}
    return {
        "network": {"conv": {leaf: ours(weight).astype(dtype)}, "none": {}},
        "encoders": [{"fc": other}, {"fc": other}],
        "vae": {"conv": other},
    }


def merged(params, *adapters):
    """The weight's merged value, in PyTorch's layout and float64."""
    (value,) = jax.tree.leaves(merge(params, adapters)["network"])
    value = np.asarray(value, np.float64)
    return np.moveaxis(value, (-1, -2), (0, 1)) if value.ndim > 1 else value


def assert_close(actual, expected, limit=1e-6):
    assert np.abs(np.asarray(actual) - expected).max() <= limit * np.abs(expected).max()


@pytest.mark.parametrize("name", CASES)
def test_change_is_the_definitions(name):
    delta, expected = CASES[name]
    assert_close(product(delta, expected.shape), expected)
    leaf = "bias" if expected.ndim == 1 else "kernel"
    path = f"network/conv/{leaf}"
    actual = merged(model(np.zeros(expected.shape), leaf), ({path: delta}, 0.5))
    assert_close(actual, 0.5 * expected)


@pytest.mark.parametrize("cores", [False, True])
def test_loha_is_lycoris(cores):
    import torch
    from lycoris.functional import loha

    delta, _ = hadamard(CONV, 2, cores)
    a1, b1, a2, b2 = (torch.tensor(x) for x in (delta.w1_a, delta.w1_b, delta.w2_a, delta.w2_b))
    cores = [torch.tensor(t) if cores else None for t in (delta.t1, delta.t2)]
    theirs = loha.diff_weight(b1, a1, b2, a2, *cores, gamma=0.3).numpy()
    assert_close(product(delta, CONV), theirs.reshape(CONV))


@pytest.mark.parametrize(
    ("factored", "core"), [((False, True), False), ((True, False), False), ((False, True), True)]
)
def test_lokr_is_lycoris(factored, core):
    import torch
    from lycoris.functional import lokr

    delta, _ = kronecker(CONV, factored, core)
    w1, w2 = (
        [torch.tensor(x) for x in w] if isinstance(w, tuple) else [torch.tensor(w)]
        for w in (delta.w1, delta.w2)
    )
    whole1, parts1 = (None, w1) if factored[0] else (w1[0], [None, None])
    whole2, parts2 = (None, w2[:2]) if factored[1] else (w2[0], [None, None])
    if factored[1] and not core:
        parts2[1] = parts2[1].reshape(len(parts2[1]), -1, *CONV[2:])
    given = whole1, *parts1, whole2, *parts2, w2[2] if core else None
    divisor = (w2 if factored[1] else w1)[0].shape[1]  # theirs, which is no rank with a core
    theirs = lokr.diff_weight(*given, gamma=0.7 * divisor).numpy()
    assert_close(product(delta, CONV), theirs.reshape(CONV))


def dora(weight, dw, magnitude):
    """m V / ||V|| of V = W + dW in float64, over the axes where m has length 1."""
    total = weight.astype(np.float64) + dw
    axes = tuple(i for i, n in enumerate(magnitude.shape) if n == 1)
    return magnitude * total / np.sqrt((total**2).sum(axes, keepdims=True))


@pytest.mark.parametrize("shape", [MATRIX, CONV, POINTWISE])
@pytest.mark.parametrize("axis", [0, 1])
def test_dora_at_a_strength_goes_straight_to_the_new_weight(shape, axis):
    weight = random_weight(shape)
    delta, dw = low_rank(shape, 2)
    size = [n if i == axis else 1 for i, n in enumerate(shape)]
    magnitude = 1 + np.random.default_rng(3).random(size).astype(np.float32)
    full = dora(weight, dw, magnitude)
    adapter = {PATH: Decomposed(delta, magnitude)}
    assert_close(merged(model(weight), (adapter, 1.0)), full)
    assert_close(merged(model(weight), (adapter, 0.3)), weight + 0.3 * (full - weight))


def test_dora_is_peft():
    import peft
    import torch

    for shape in (MATRIX, CONV):
        out, width, *kernel = shape
        torch.manual_seed(0)
        base = torch.nn.Conv2d(width, out, kernel) if kernel else torch.nn.Linear(width, out)
        options = dict(r=2, lora_alpha=3, use_dora=True, init_lora_weights=False)
        config = peft.LoraConfig(target_modules=["0"], **options)
        layer = peft.inject_adapter_in_model(config, torch.nn.Sequential(base))[0]
        factor = layer.lora_magnitude_vector["default"].weight
        with torch.no_grad():
            factor *= 1 + torch.rand_like(factor)
            unit = torch.eye(width * int(np.prod(kernel))).reshape(-1, width, *kernel)
            responses = layer(unit) - layer.base_layer.bias.reshape(out, *(1 for _ in kernel))
        theirs = responses.reshape(-1, out).T.reshape(shape).numpy()
        down, up = (
            getattr(layer, name)["default"].weight.detach().numpy() for name in ("lora_A", "lora_B")
        )
        magnitude = factor.detach().numpy().reshape(out, *(1,) * (len(shape) - 1))
        adapter = Decomposed(LowRank(down, up, np.float32(1.5)), magnitude)
        weight = layer.base_layer.weight.detach().numpy()
        assert_close(merged(model(weight), ({PATH: adapter}, 1.0)), theirs, 3e-6)


def test_several_adapters_of_one_weight_sum():
    weight, magnitude = random_weight(CONV), np.full((6, 1, 1, 1), 2, np.float32)
    plain = [low_rank(CONV, 2), low_rank(CONV, 3, seed=1), tucker(CONV, 2), hadamard(CONV, 2)]
    norms = [low_rank(CONV, 2, seed=4), low_rank(CONV, 1, seed=5)]
    strengths = 0.5, -1.0, 0.25, 2.0, 0.75, 0.5
    expected = weight.astype(np.float64)
    adapters = []
    for (delta, dw), strength in zip(plain, strengths):
        expected = expected + strength * dw
        adapters.append(({PATH: delta}, strength))
    for (delta, dw), strength in zip(norms, strengths[4:]):
        expected = expected + strength * (dora(weight, dw, magnitude) - weight)
        adapters.append(({PATH: Decomposed(delta, magnitude)}, {PATH: strength}))
    assert_close(merged(model(weight), *adapters), expected)
    assert_close(merged(model(weight), *reversed(adapters)), expected)


def test_several_loras_are_one_product():
    weight = jnp.asarray(ours(random_weight(CONV)))
    loras = [(low_rank(CONV, r)[0], jnp.ones(())) for r in (2, 3, 4)]
    text = str(jax.make_jaxpr(lambda w: merging.changed(w, loras, True))(weight))
    assert text.count("dot_general[") == 1


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_strength_zero_is_the_base_to_the_bit(dtype):
    weight = random_weight(CONV)
    weight[0] = -0.0
    params = model(weight, dtype=dtype)
    kept = jax.tree.map(np.copy, params)
    magnitude = np.ones((6, 1, 1, 1), np.float32)
    lora, loha = low_rank(CONV, 2)[0], hadamard(CONV, 2)[0]
    adapters = [
        ({PATH: lora, "encoders/1/fc/kernel": low_rank((2, 2), 1)[0]}, 0.0),
        ({PATH: loha}, {PATH: 0}),
        ({PATH: Decomposed(lora, magnitude)}, 0.0),
    ]
    result = merge(params, adapters)
    assert jax.tree.structure(result) == jax.tree.structure(kept)
    for new, old in zip(jax.tree.leaves(result), jax.tree.leaves(kept)):
        assert new.dtype == old.dtype
        assert np.asarray(new).tobytes() == old.tobytes()
    changed = merge(params, [({PATH: lora}, 1.0)])
    assert not np.array_equal(*jax.tree.leaves((changed["network"], kept["network"])))
    for new, old in zip(jax.tree.leaves(params), jax.tree.leaves(kept)):
        assert new.tobytes() == old.tobytes()  # what was given is as it was


def test_low_precision_is_rounded_once():
    weight, (delta, dw) = random_weight(MATRIX), low_rank(MATRIX, 3)
    weight = weight.astype(ml_dtypes.bfloat16)
    actual = merged(model(weight, dtype=ml_dtypes.bfloat16), ({PATH: delta}, 1.0))
    once = (weight.astype(np.float64) + dw).astype(np.float32).astype(ml_dtypes.bfloat16)
    assert np.array_equal(actual, once.astype(np.float64))


def test_other_strengths_compile_nothing():
    params = model(random_weight((7, 4, 3, 2)))
    adapters = {PATH: low_rank((7, 4, 3, 2), 2)[0]}, {PATH: low_rank((7, 4, 3, 2), 3)[0]}
    before = merging.changed._cache_size()
    for a, b in ((0.5, 1.0), (0.1, 0.0), (1, -2)):
        merge(params, [(adapters[0], a), (adapters[1], {PATH: b})])
    assert merging.changed._cache_size() == before + 1


def test_strengths_are_a_grid_under_vmap():
    params = model(random_weight(CONV))
    first, second = {PATH: low_rank(CONV, 2)[0]}, {PATH: low_rank(CONV, 3, seed=1)[0]}
    grid = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.3, -0.7]])

    def at(strengths):
        made = merge(params, [(first, strengths[0]), (second, {PATH: strengths[1]})])
        return made["network"]["conv"]["kernel"]

    for row, weight in zip(grid, jax.jit(jax.vmap(at))(grid)):
        np.testing.assert_allclose(weight, at(row), rtol=1e-6, atol=1e-6)


def test_strengths_have_gradients_even_at_zero():
    params, (delta, dw) = model(np.zeros(CONV)), low_rank(CONV, 2)

    def total(strength):
        return merge(params, [({PATH: delta}, strength)])["network"]["conv"]["kernel"].sum()

    np.testing.assert_allclose(jax.grad(total)(0.0), dw.sum(), rtol=1e-5)


def test_mistakes_are_named():
    params, lora = model(random_weight(CONV)), low_rank(CONV, 2)[0]
    with pytest.raises(ValueError, match=r"no parameter network/cnv/kernel; nearest: network/conv"):
        merge(params, [({"network/cnv/kernel": lora}, 1.0)])
    for wrong in (low_rank(MATRIX, 2)[0], low_rank((5, 4, 3, 2), 2)[0], hadamard(MATRIX, 2)[0]):
        with pytest.raises(ValueError, match=f"{PATH}: factors make a change .* does not fit"):
            merge(params, [({PATH: wrong}, 1.0)])
    with pytest.raises(ValueError, match=f"{PATH}: factors"):
        merge(params, [({PATH: Full(np.ones(6, np.float32), np.float32(1))}, 1.0)])
