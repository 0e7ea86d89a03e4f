"""Inception-v3 against its definition in PyTorch's plain functions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffusion.models import inception
from diffusion.models.inception import Inception
from diffusion.pretrained.names import to_tensors
from diffusion.pretrained.networks.inception import NAMES

torch.set_num_threads(1)

CLASSES = 11
A = {"branch1x1": ["1x1"], "branch5x5": ["1x1", "5x5"], "branch3x3dbl": ["1x1", "3x3", "3x3"]}
B = {"branch3x3": ["3x3"], "branch3x3dbl": ["1x1", "3x3", "3x3"]}
C = {"branch1x1": ["1x1"], "branch7x7": ["1x1", "1x7", "7x1"]}
C |= {"branch7x7dbl": ["1x1", "7x1", "1x7", "7x1", "1x7"]}
D = {"branch3x3": ["1x1", "3x3"], "branch7x7x3": ["1x1", "1x7", "7x1", "3x3"]}
E = {"branch1x1": ["1x1"], "branch3x3": ["1x1", "both"], "branch3x3dbl": ["1x1", "3x3", "both"]}


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        name = path[-1].key
        if name == "kernel":
            std = np.float32((2 / np.prod(leaf.shape[:-1])) ** 0.5)
            return std * rng.standard_normal(leaf.shape, np.float32)
        low, high = {"scale": (0.7, 1.3), "running_var": (0.5, 1.5)}.get(name, (-0.1, 0.1))
        return rng.uniform(low, high, leaf.shape).astype(np.float32)

    image = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    shapes = jax.eval_shape(Inception(CLASSES).init, jax.random.key(0), image)["params"]
    return jax.tree_util.tree_map_with_path(fill, shapes)


def reference(net, params, x):
    """Features, spatial features, logits in float64 of x [B, H, W, 3]."""
    w = {key: torch.from_numpy(a).double() for key, a in to_tensors(NAMES, params)}

    def unit(x, name, sides, stride=1, valid=False):
        k = w[f"{name}.conv.weight"]
        assert "{}x{}".format(*k.shape[2:]) == sides
        padding = 0 if valid else [side // 2 for side in k.shape[2:]]
        norm = [
            w[f"{name}.bn.{leaf}"] for leaf in ("running_mean", "running_var", "weight", "bias")
        ]
        return F.relu(F.batch_norm(F.conv2d(x, k, None, stride, padding), *norm, eps=1e-3))

    def pooled(x, kind):
        if kind == "max":
            return F.max_pool2d(x, 3, 1, 1)
        return F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)

    def block(x, name, branches, pool):
        found = []
        for branch, steps in branches.items():
            h = x
            for i, sides in enumerate(steps):
                own = f"{name}.{branch}" + (f"_{i + 1}" if len(steps) > 1 else "")
                last = pool == "stride" and i == len(steps) - 1
                if sides == "both":
                    h = torch.cat([unit(h, f"{own}a", "1x3"), unit(h, f"{own}b", "3x1")], 1)
                else:
                    h = unit(h, own, sides, 1 + last, last)
            found.append(h)
        if pool == "stride":
            found.append(F.max_pool2d(x, 3, 2))
        else:
            found.append(unit(pooled(x, pool), f"{name}.branch_pool", "1x1"))
        return torch.cat(found, 1), found[0]

    x = torch.from_numpy(x).double().permute(0, 3, 1, 2)
    x = unit(x, "Conv2d_1a_3x3", "3x3", 2, True)
    x = unit(x, "Conv2d_2a_3x3", "3x3", 1, True)
    x = F.max_pool2d(unit(x, "Conv2d_2b_3x3", "3x3"), 3, 2)
    x = unit(x, "Conv2d_3b_1x1", "1x1")
    x = F.max_pool2d(unit(x, "Conv2d_4a_3x3", "3x3", 1, True), 3, 2)
    kinds = {"5b": A, "5c": A, "5d": A, "6a": B, "6b": C, "6c": C, "6d": C, "6e": C, "7a": D}
    for name, branches in kinds.items():
        x, first = block(x, f"Mixed_{name}", branches, "stride" if name[1] == "a" else "mean")
        if name == "6d":
            spatial = first[:, :7].permute(0, 2, 3, 1).flatten(1)
    x, _ = block(x, "Mixed_7b", E, "mean")
    x, _ = block(x, "Mixed_7c", E, net.last_pool)
    features = x.mean((2, 3))
    return features, spatial, features @ w["fc.weight"].T if net.classes else None


@pytest.mark.parametrize("net", [Inception(CLASSES), Inception(0, "mean")], ids=["fid", "keras"])
def test_is_the_network_of_its_definition(net, params):
    # The last block has 3 x 2 pixels: of a single one all pools are the same.
    x = np.random.default_rng(1).uniform(-1, 1, (1, 139, 107, 3)).astype(np.float32)
    outputs = jax.jit(net.apply)({"params": params}, x)
    for name, one, expected in zip(outputs._fields, outputs, reference(net, params, x)):
        if expected is None:
            assert one is None
            continue
        np.testing.assert_allclose(one, expected, rtol=0, atol=1e-4, err_msg=name)


def test_sizes_are_those_that_metrics_expect():
    image = jax.ShapeDtypeStruct((5, 299, 299, 3), jnp.float32)
    outputs, _ = jax.eval_shape(Inception().init_with_output, jax.random.key(0), image)
    assert [one.shape for one in outputs] == [(5, 2048), (5, 2023), (5, 1008)]


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (6, 2), (7, 7)])
def test_means_leave_the_border_out(shape):
    x = np.random.default_rng(0).normal(size=(1, *shape, 2)).astype(np.float32)
    expected = np.empty_like(x)
    for i, j in np.ndindex(shape):
        near = x[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2]
        expected[:, i, j] = near.mean((1, 2))
    np.testing.assert_allclose(inception.mean_pool(x), expected, atol=1e-6)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(3, 4), (7, 9), (8, 8)])
def test_maxima_are_of_three_by_three(stride, shape):
    x = np.random.default_rng(0).normal(size=(2, *shape, 3)).astype(np.float32) - 5
    given = inception.max_pool(jnp.asarray(x), stride)
    expected = F.max_pool2d(torch.from_numpy(x).permute(0, 3, 1, 2), 3, stride, 2 - stride)
    np.testing.assert_array_equal(given, expected.permute(0, 2, 3, 1))
