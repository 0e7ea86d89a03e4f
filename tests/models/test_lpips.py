from importlib.metadata import version

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from torch.nn import functional as F

from diffusion.models.lpips import LPIPS
from diffusion.pretrained.networks import lpips

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
TAPS = (2, 7, 14, 21, 28)  # each followed by ReLU; all but the last then by pooling

OPTION = tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11)


@pytest.fixture(scope="module")
def tensors():
    rng = np.random.default_rng(0)
    width, found = 3, {}
    for k, out in zip(CONVOLUTIONS, [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6):
        kernel = rng.standard_normal((out, width, 3, 3), np.float32)
        found[f"features.{k}.weight"] = kernel * np.float32((2 / (9 * width)) ** 0.5)
        found[f"features.{k}.bias"] = 0.1 * rng.standard_normal(out, np.float32)
        width = out
    for k, width in enumerate((64, 128, 256, 512, 512)):
        found[f"lin{k}.model.1.weight"] = rng.random((1, width, 1, 1), np.float32)
    return found


def reference(tensors, x, y):
    tensors = {key: torch.from_numpy(value) for key, value in tensors.items()}
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]
    h = (torch.from_numpy(np.moveaxis(np.concatenate([x, y]), -1, 1)) - shift) / scale
    total = 0
    for k in CONVOLUTIONS:
        h = F.conv2d(h, tensors[f"features.{k}.weight"], tensors[f"features.{k}.bias"], padding=1)
        h = F.relu(h)
        if k in TAPS:
            unit = h / (h.square().sum(1, keepdim=True).sqrt() + 1e-10)
            f, g = unit.chunk(2)
            head = tensors[f"lin{TAPS.index(k)}.model.1.weight"]
            total = total + F.conv2d((f - g).square(), head).mean((1, 2, 3))
            h = F.max_pool2d(h, 2) if k < TAPS[-1] else h
    return total.numpy()


def test_is_that_of_torch_from_a_file(tensors, tmp_path):
    path = tmp_path / "lpips.safetensors"
    others = {"classifier.0.weight": np.ones(1, np.float32)}  # a whole VGG16's
    safetensors.numpy.save_file(tensors | others, path)
    params = lpips.load(path)
    x, y = np.random.default_rng(1).normal(size=(2, 2, 16, 16, 3)).astype(np.float32) / 2
    y[0] = x[0] + 0.05 * y[0]
    compiled = jax.jit(
        jax.value_and_grad(
            lambda y, params: (lambda d: (d.sum(), d))(LPIPS().apply({"params": params}, x, y)),
            has_aux=True,
        ),
        # The others (conftest.py) round a difference one way in the loss, another in its gradient.
        # From jaxlib 0.11 on there are no others, and no such option.
        compiler_options={"xla_cpu_use_fusion_emitters": True} if OPTION else None,
    )
    (_, distance), grad = compiled(y, params)
    np.testing.assert_allclose(distance, reference(tensors, x, y), rtol=1e-4)
    assert distance[0] < 0.5 * distance[1]
    assert np.isfinite(grad).all() and abs(grad).max() > 0
    (_, same), grad = compiled(x, params)
    assert (same == 0).all() and (grad == 0).all()  # and no NaN where nothing differs


@pytest.mark.parametrize("change, message", [("lin3.model.1.weight", "1 missing: lin3")])
def test_incomplete_files_are_refused(tensors, tmp_path, change, message):
    path = tmp_path / "lpips.safetensors"
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if k != change}, path)
    with pytest.raises(ValueError, match=message):
        lpips.load(path)


def test_pickles_are_refused(tmp_path):
    path = tmp_path / "vgg.pth"
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="safetensors"):
        lpips.load(path)


def test_images_that_do_not_fit():
    image = jnp.zeros((1, 8, 8, 3))
    with pytest.raises(ValueError, match="at least 16 x 16"):
        jax.eval_shape(LPIPS().init, jax.random.key(0), image, image)
