"""I3D against a network of the paper's table in PyTorch, and clips that move or stand still."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional

from diffusion.data.sources import Source
from diffusion.evaluation import sample_files, selection
from diffusion.evaluation.harness import Harness
from diffusion.evaluation.metrics.metric import Data, of_array
from diffusion.evaluation.networks import i3d as networks
from diffusion.evaluation.networks.i3d import i3d
from diffusion.models.i3d import I3D
from diffusion.pretrained.networks import i3d as weights_of

RNG = np.random.default_rng(0)


def same(x, window, stride, value=0.0):
    """Padding by TensorFlow's rule: as many outputs as strides fit in, the odd side last."""
    pads = []
    for n, k, s in reversed(list(zip(x.shape[2:], window, stride))):
        lacking = max((-(-n // s) - 1) * s + k - n, 0)
        pads += [lacking // 2, lacking - lacking // 2]
    return functional.pad(x, pads, value=value)


class Convolution(nn.Module):
    def __init__(self, old, new, k=1, s=1, norm=True):
        super().__init__()
        self.k, self.s = (k,) * 3, (s,) * 3
        self.conv3d = nn.Conv3d(old, new, k, s, bias=not norm)
        self.bn = nn.BatchNorm3d(new, eps=1e-3) if norm else None

    def forward(self, x):
        x = self.conv3d(same(x, self.k, self.s))
        return x if self.bn is None else self.bn(x).relu()


def pool(x, window, stride):
    return functional.max_pool3d(same(x, window, stride, -torch.inf), window, stride)


class Mixed(nn.Module):
    def __init__(self, old, a, b, c, d, e, f):
        super().__init__()
        self.b0 = Convolution(old, a)
        self.b1a, self.b1b = Convolution(old, b), Convolution(b, c, 3)
        self.b2a, self.b2b = Convolution(old, d), Convolution(d, e, 3)
        self.b3b = Convolution(old, f)

    def forward(self, x):
        pooled = self.b3b(pool(x, (3, 3, 3), (1, 1, 1)))
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)), pooled], 1)


class Theirs(nn.Module):
    """Inception-v1's table, its windows inflated in time; strides in time after Mixed_3c only."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Convolution(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Convolution(64, 64)
        self.Conv3d_2c_3x3 = Convolution(64, 192, 3)
        self.Mixed_3b = Mixed(192, 64, 96, 128, 16, 32, 32)
        self.Mixed_3c = Mixed(256, 128, 128, 192, 32, 96, 64)
        self.Mixed_4b = Mixed(480, 192, 96, 208, 16, 48, 64)
        self.Mixed_4c = Mixed(512, 160, 112, 224, 24, 64, 64)
        self.Mixed_4d = Mixed(512, 128, 128, 256, 24, 64, 64)
        self.Mixed_4e = Mixed(512, 112, 144, 288, 32, 64, 64)
        self.Mixed_4f = Mixed(528, 256, 160, 320, 32, 128, 128)
        self.Mixed_5b = Mixed(832, 256, 160, 320, 32, 128, 128)
        self.Mixed_5c = Mixed(832, 384, 192, 384, 48, 128, 128)
        self.logits = Convolution(1024, 400, norm=False)

    def forward(self, x):
        x = pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        x = pool(self.Mixed_3c(self.Mixed_3b(x)), (3, 3, 3), (2, 2, 2))
        for name in "bcdef":
            x = getattr(self, f"Mixed_4{name}")(x)
        x = self.Mixed_5c(self.Mixed_5b(pool(x, (2, 2, 2), (2, 2, 2))))
        x = functional.avg_pool3d(x, (2, *x.shape[3:]), 1)
        return self.logits(x)[..., 0, 0].mean(-1)


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """Their network, and the file of its weights."""
    torch.set_num_threads(2)
    torch.manual_seed(0)
    net = Theirs().eval()
    for part in net.modules():
        if isinstance(part, nn.Conv3d):
            nn.init.normal_(part.weight, std=(2 / part.weight[0].numel()) ** 0.5)
        if isinstance(part, nn.BatchNorm3d):
            nn.init.uniform_(part.weight, 0.7, 1.3)
            nn.init.normal_(part.bias, std=0.1)
            nn.init.normal_(part.running_mean, std=0.1)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    path = tmp_path_factory.mktemp("i3d") / "i3d.safetensors"
    safetensors.torch.save_file(net.state_dict(), path)
    return net, str(path)


@pytest.fixture
def small(monkeypatch):
    """Networks take clips at this size. Halving it leaves odd numbers, where padding differs."""
    monkeypatch.setattr(networks, "SIDE", 36)
    return 36


def test_logits_are_theirs(theirs, small):
    net, path = theirs
    x = RNG.integers(0, 256, (3, 18, small, small, 3), np.uint8)
    with torch.no_grad():
        given = torch.from_numpy(x).permute(0, 4, 1, 2, 3)
        expected = net(given / 127.5 - 1).numpy()
    assert expected.std() > 0.1
    ours = i3d(path)(x, [None] * 3)["features"]
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_parameters_are_as_many_as_published():
    clip = jax.ShapeDtypeStruct((1, 16, 224, 224, 3), jnp.float32)
    shapes = jax.eval_shape(I3D().init, jax.random.key(0), clip)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    trained = [x.size for path, x in leaves if "running" not in jax.tree_util.keystr(path)]
    assert sum(trained) == 12_697_264


def squares(count, rng):
    """Clips uint8 [N, 18, 36, 36, 3] of a bright square that moves 3 pixels a frame."""
    x = np.full((count, 18, 36, 36, 3), 30, np.uint8)
    for clip in x:
        row, column, colour = *rng.integers(0, 26, 2), rng.integers(120, 256, 3)
        for t, frame in enumerate(clip):
            frame[row : row + 10, np.arange(column + 3 * t, column + 3 * t + 10) % 36] = colour
    return x


def source(x):
    def read(index):
        return {"x": x[index] / np.float32(127.5) - 1}

    return Source("squares", len(x), x.shape[1:], read)


def test_clips_of_all_kinds_are_told_apart(theirs, small, tmp_path):
    real = squares(4, np.random.default_rng(1))
    elsewhere, still = np.roll(real, 2, axis=3), np.repeat(real[:, :1], 18, axis=1)
    spec = f'frechet(i3d("{theirs[1]}"), splits=1)'
    judge = Harness(
        selection.make([spec], None),
        None,
        lambda: Data(source(real), source(real)),
    )
    np.savez(tmp_path / "clips.npz", x=elsewhere / np.float32(127.5) - 1)
    np.savez(tmp_path / "bytes.npz", arr_0=still)
    moved, stood = (
        judge.evaluate(sample_files.read(str(tmp_path / f"{name}.npz")))
        for name in ("clips", "bytes")
    )
    assert 0 < 3 * moved["fd_i3d"] < stood["fd_i3d"]
    provenance = moved["provenance"][spec]
    assert provenance["resolution"] == [18, 36, 36, 3] and provenance["quantised"]
    with pytest.raises(ValueError, match=r"expected samples \[N, 18, 36, 36, 3\]"):
        judge.evaluate(of_array(still[:, :, :16]))


def test_clips_of_every_size_are_resized(theirs, small):
    """Constant frames of any size, by either rule, are the same."""
    x = RNG.integers(0, 256, (2, 18, 1, 1, 3), np.uint8)
    nets = [i3d(theirs[1], resize) for resize in networks.RESIZES]
    assert [net.name for net in nets] == ["i3d", "i3d_tf"]
    wide = np.broadcast_to(x, (2, 18, 3, 5, 3))
    a, b = (net(clips, [None] * 2)["features"] for net, clips in zip(nets, (x, wide)))
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_what_cannot_be_judged_is_refused(theirs, tmp_path):
    net = i3d(theirs[1])
    with pytest.raises(ValueError, match="9 frames or more, got 8"):
        net(np.zeros((2, 8, 8, 8, 3), np.uint8), [None] * 2)
    with pytest.raises(
        ValueError, match=r"judges clips \[N, T, H, W, 1 or 3\], got \(2, 8, 8, 3\)"
    ):
        net(np.zeros((2, 8, 8, 3), np.uint8), [None] * 2)
    with pytest.raises(ValueError, match="tf"):
        i3d(theirs[1], "tff")
    tensors = safetensors.torch.load_file(theirs[1])
    del tensors["Mixed_4d.b2b.bn.running_var"]
    safetensors.torch.save_file(tensors, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"1 missing: Mixed_4d\.b2b\.bn\.running_var"):
        weights_of.load(tmp_path / "part.safetensors")
